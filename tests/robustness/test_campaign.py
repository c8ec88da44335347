"""A part of the campaign with a fixed seed, and that the campaign sees what it is there to see."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from robustness.attempts import Kind, kinds
from robustness.campaign import Tally, attempt, try_kind, unclean

from fluxrun.errors import ConfigError, FluxrunError

pytestmark = pytest.mark.slow

SEED = 20250101

SECONDS = 8.0
"""Each kind's part ends after this, with however many cases a machine has done by then."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cases"),
    [("overrides", 40), ("config files", 40), ("prompt files", 300), ("picture metadata", 150), ("records", 20),
     ("checkpoints", 25)],
)  # fmt: skip
def test_each_case_works_or_is_refused_in_one_line(name, cases, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tally = try_kind(kinds()[name], cases, SEED, seconds=SECONDS)
    assert tally.failed == 0, list(tally.failures.values())
    assert tally.tried == tally.worked + tally.refused > 0


def test_every_kind_has_its_part():
    (mark,) = [m for m in test_each_case_works_or_is_refused_in_one_line.pytestmark if m.name == "parametrize"]
    assert [name for name, _ in mark.args[1]] == list(kinds())


def _fine(case: Any, folder: Path) -> None:
    return None


def _refused(case: Any, folder: Path) -> None:
    raise ConfigError("no\nsuch \x1b[2J thing")


def _mistaken(case: Any, folder: Path) -> None:
    raise KeyError(case)


def _silent(case: Any, folder: Path) -> None:
    raise FluxrunError("")


def _endless(case: Any, folder: Path) -> None:
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("action", "expected"),
    [(_fine, (1, 0, 0)), (_refused, (0, 1, 0)), (_mistaken, (0, 0, 1)), (_silent, (0, 0, 1)), (_endless, (0, 0, 1))],
)
def test_what_a_case_counts_as(action, expected):
    tally = Tally("a kind", SEED)
    attempt(Kind("a kind", st.just(1), action, deadline_s=0.2), 1, tally)
    assert (tally.worked, tally.refused, tally.failed) == expected
    assert len(tally.failures) == expected[2]


def test_a_seed_means_the_same_cases():
    seen: list[list[Any]] = []
    for _ in range(2):
        seen.append([])
        kind = Kind("numbers", st.integers(), lambda case, folder: seen[-1].append(case), deadline_s=5)
        assert try_kind(kind, 50, SEED).tried == 50
    assert seen[0] == seen[1]


@pytest.mark.parametrize("text", ["", "a\nb", "a\x1bb", "\u202ea", "\ud800", "x" * 3000])
def test_what_a_message_may_not_be(text):
    assert unclean(text)
    assert unclean("seed=-1: at least 0 – or 1") is None
