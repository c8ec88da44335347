"""The next batch's texts, given to a GPU behind the pictures that it decodes: it need not wait for the CPU to come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fluxrun.errors import one_line
from fluxrun.pipeline.session import Session
from fluxrun.process.clock import DeviceClock
from fluxrun.process.device import takes_work_ahead

log = logging.getLogger("fluxrun.generate")


def goes_ahead(session: Session) -> bool:
    """Whether texts may be encoded beside a picture: the models stay where they are, and nobody times it or waits."""
    plan = session.plan
    stay = not (plan.memory.staged or plan.memory.offloads)
    alone = plan.config.measure.repeats == 1 and session.ranks.size == 1
    return stay and alone and takes_work_ahead(plan.machine.device)


@contextmanager
def encoding_ahead(
    session: Session, texts: Sequence[str], clock: DeviceClock, before: Callable[[], None]
) -> Iterator[None]:
    """Around a pipeline call: when the device has been given all of its pictures, it is given these texts.

    Only the fast decoder says when that is. ``before`` is called first: what is noted of the memory is the decoder's.
    """
    if not texts or not goes_ahead(session):
        yield
        return

    def encode() -> None:
        before()
        if session.interrupts.requested:
            return
        try:
            session.prompts.encode_ahead(texts, session.pipeline, clock)
        except Exception as error:
            # This picture is not to blame; in its own call the text is encoded again, and that error counts.
            log.debug("a text could not be encoded ahead: %s", one_line(error))

    session.pipeline.image_processor.meanwhile = encode
    try:
        yield
    finally:
        del session.pipeline.image_processor.meanwhile
