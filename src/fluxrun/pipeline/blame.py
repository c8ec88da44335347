"""Whose failure was it? Reads an exception's chain for the option that is to fall back."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from fluxrun.errors import chain, one_line
from fluxrun.options.groups import TABLE


@dataclass(frozen=True)
class Failure:
    """What failed, as the processes that draw a picture together tell each other."""

    group: str | None
    """Whose option gives way; None: nobody's."""
    reason: str
    kind: str
    out_of_memory: bool
    trace: str

    @classmethod
    def of(cls, error: BaseException, group: str | None) -> Failure:
        """The same of an error."""
        trace = "".join(traceback.format_exception(error)).rstrip()
        return cls(group, one_line(error), type(error).__name__, is_out_of_memory(error), trace)


class AgreedFailure(Exception):
    """A failure on which all processes go by, whether it was this one's or another's."""

    def __init__(self, failure: Failure, own: BaseException | None) -> None:
        super().__init__(failure.reason)
        self.failure, self.own = failure, own


def blame(error: BaseException, suspects: Sequence[str]) -> str | None:
    """The group among ``suspects`` whose code the error comes from; else the first, the likeliest; None for none."""
    places = _places(error)
    for group in TABLE:
        if group.name in suspects and any(mark in place for place in places for mark in group.marks):
            return group.name
    return suspects[0] if suspects else None


def _places(error: BaseException) -> list[str]:
    """Files and error types along the whole chain of causes and contexts, innermost frames included."""
    places: list[str] = []
    for one in chain(error):
        places += [frame.filename for frame in traceback.extract_tb(one.__traceback__)]
        places.append(f"{type(one).__module__.replace('.', '/')}/{type(one).__qualname__}")
    return places


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up, on a GPU or on the CPU."""
    import torch

    cpu = isinstance(error, (RuntimeError, MemoryError)) and (
        "can't allocate memory" in str(error) or isinstance(error, MemoryError)
    )
    return isinstance(error, torch.OutOfMemoryError) or cpu
