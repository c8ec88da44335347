"""Which option spoils a picture: the one without which it is sound, as one more drawing shows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from fluxrun.config.catalog import neutral_options
from fluxrun.errors import Interrupted, one_line
from fluxrun.pipeline.session import Session
from fluxrun.planning import fallbacks

T = TypeVar("T")

log = logging.getLogger("fluxrun.build")


def has_suspects(session: Session) -> bool:
    """Whether an option is in use that a picture can be drawn without."""
    return bool(fallbacks.not_neutral(session.plan))


def find_culprit(session: Session, draw: Callable[[str], T], sound: Callable[[T], bool], what: str) -> T | None:
    """Draw with one option neutral after the other, the likeliest culprit first, until a drawing is sound.

    Then that option has fallen back for good, and the drawing is returned. With None every choice is as it was, and
    the session has to be assembled again. ``what`` is what was wrong, for the record: "the picture is not finite".
    """
    said = fallbacks.known(session.plan)
    for group in fallbacks.not_neutral(session.plan):
        put_back = fallbacks.remembered(session.plan)
        drawn = _drawn_with_neutral(session, group, draw, what)
        if drawn is not None and sound(drawn):
            fallbacks.announce(session.plan, said)
            session.note_change()
            return drawn
        put_back()
    return None


def _drawn_with_neutral(session: Session, group: str, draw: Callable[[str], T], what: str) -> T | None:
    """A drawing with the group's option neutral; None where that cannot be built or drawn."""
    session.interrupts.check()
    neutral = f"{group}={neutral_options()[group]}"
    try:
        fallbacks.give_way_to_neutral(session.plan, group, f"{what}; with {neutral} it is")
        session.prompts.forget_not_finite()
        session.assemble_once()
        return draw(f"with {neutral}")
    except (Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever it is, it only means that this trial shows nothing
        log.info("%s could not be tried: %s", neutral, one_line(error))
        session.let_go(error)
        return None
