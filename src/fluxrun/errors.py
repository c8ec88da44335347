"""The error tree: every failure a user can meet, with the exit code it ends in."""

from __future__ import annotations

import traceback
from collections.abc import Iterator

from fluxrun.formatting import as_message, printable


class FluxrunError(Exception):
    """A failure that is explained in one line on the screen; its traceback goes to the log only.

    Whatever the message quotes, it is one line without control characters, and not too long.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(as_message(message))


class ConfigError(FluxrunError):
    """Refused before any work began: says what, what was got, what is allowed and what to do."""

    exit_code = 2


class TrustError(ConfigError):
    """A config that may come from a stranger tries to run code or to steer Hydra."""


class OptionUnavailable(FluxrunError):
    """An option cannot be used here and has no fallback left (or ``strict=true`` forbids one).

    Raised at ``requires`` it is a refusal (exit 2, nothing was loaded); later it is a failed run (exit 1).
    """

    def __init__(self, message: str, *, stage: str = "requires") -> None:
        super().__init__(message)
        self.exit_code = 2 if stage == "requires" else 1


class OptionFailed(Exception):
    """An option's failure on its way to the fallback, with the group it belongs to; never shown to a user."""

    def __init__(self, group: str, error: BaseException) -> None:
        super().__init__(one_line(error))
        self.group, self.error = group, error


class OutOfMemory(FluxrunError):
    """The run does not fit; the message names the options that would."""


class NotFinite(FluxrunError):
    """Pictures were drawn from values that are no numbers (NaN, infinite), and no option was shown to be to blame."""


class Interrupted(FluxrunError):
    """The user (SIGINT, 130), the system (SIGTERM, 143) or a closed terminal (SIGHUP, 129) asked the run to stop."""

    exit_code = 130


def mark_said(error: BaseException) -> None:
    """Note that the user has been told of it: the record, which else says so, may be gone with its folder."""
    error.__dict__["said"] = True


def is_said(error: BaseException) -> bool:
    """Whether the user has been told of it already."""
    return "said" in error.__dict__


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all its causes and contexts, each once: an error can have both, and the chain can be a circle."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__context__, one.__cause__]


def one_line(error: BaseException, limit: int = 400) -> str:
    """The first meaningful line of an error's text, at most ``limit`` characters, never empty.

    A line that announces the reason (transformers' "… because of the following error:") brings the next one with it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    announced = lines[1:2] if lines and lines[0].endswith(":") else []
    text = printable(" ".join([*lines[:1], *announced])) or type(error).__name__
    if type(error) is KeyError:  # its text is the key alone
        text = f"KeyError: {text}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def python_reason(error: BaseException) -> str:
    """The first line of an error's text, without Python's advice on how to allow a number of any length."""
    if "set_int_max_str_digits" in str(error):
        return "a number of more than 4300 digits"
    return "it is nested too deep" if isinstance(error, RecursionError) else one_line(error)


def raised_by_fluxrun(error: BaseException) -> bool:
    """Whether the line that raised ``error`` is fluxrun's own, not a library's."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__", "")).partition(".")[0] == "fluxrun"


def exit_code_of(error: BaseException) -> int:
    """The process's exit code for what ended a run."""
    return error.exit_code if isinstance(error, FluxrunError) else 130 if isinstance(error, KeyboardInterrupt) else 1
