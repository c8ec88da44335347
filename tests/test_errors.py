"""Errors and what led to them."""

from __future__ import annotations

import pytest

from fluxrun.errors import chain, one_line
from fluxrun.pipeline.blame import blame


def raised(error: BaseException, *, cause: BaseException | None = None, context: BaseException | None = None):
    error.__cause__, error.__context__ = cause, context
    return error


def test_a_chain_has_the_cause_and_the_context():
    cause = raised(KeyError("cause"), context=ValueError("behind the cause"))
    context = raised(TypeError("context"), cause=OSError("behind the context"))
    found = list(chain(raised(RuntimeError("last"), cause=cause, context=context)))
    assert [type(one) for one in found] == [RuntimeError, KeyError, ValueError, TypeError, OSError]


def test_what_is_both_cause_and_context_is_there_once():
    cause = ValueError("real")
    assert list(chain(raised(RuntimeError(), cause=cause, context=cause)))[1:] == [cause]


def test_a_chain_that_is_a_circle_ends():
    first, second = ValueError("first"), RuntimeError("second")
    raised(first, cause=second)
    raised(second, context=first)
    assert list(chain(first)) == [first, second]
    assert blame(first, ["compile", "attention"]) == "compile"


def test_the_context_beside_a_cause_is_blamed():
    foreign = type("NotSupported", (Exception,), {"__module__": "cache_dit.blocks"})
    error = raised(RuntimeError("no luck"), cause=KeyError("x"), context=foreign())
    assert blame(error, ["compile", "cache"]) == "cache"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("Failed because of the following error (look up):\n\nno such module\nmore"),
            "Failed because of the following error (look up): no such module",
        ),
        (KeyError("prompt"), "KeyError: 'prompt'"),
        (ValueError("\n first \nsecond"), "first"),
        (ValueError(), "ValueError"),
    ],
)
def test_one_line_holds_the_reason(error: Exception, line: str) -> None:
    assert one_line(error) == line
