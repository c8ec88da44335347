"""Tries thousands of broken inputs: each works, or is refused in one line. ``make robustness`` runs all of it."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from robustness.attempts import Kind, kinds

from fluxrun.errors import FluxrunError

LONGEST_MESSAGE = 2000

MEMORY_BYTES = 8 * 2**30
"""A case that asks for absurd sizes must not take the machine with it."""

SHOWN = 400


class Hung(BaseException):
    """A case took longer than its kind's deadline; not an Exception, so that nothing swallows it."""


@dataclass
class Failure:
    """One way of failing: which error, from which line of fluxrun, how often, and one case that does it."""

    error: str
    where: str
    count: int
    example: str


@dataclass
class Tally:
    """How the cases of one kind went."""

    kind: str
    seed: int
    tried: int = 0
    worked: int = 0
    refused: int = 0
    failed: int = 0
    slowest_s: float = 0.0
    slowest: str = ""
    total_s: float = 0.0
    failures: dict[str, Failure] = field(default_factory=dict)


def attempt(kind: Kind, case: Any, tally: Tally) -> None:
    """One case: it works, or raises FluxrunError with one clean line; whatever else happens is counted as failed."""
    folder = Path(tempfile.mkdtemp(prefix="fluxrun-case-"))
    started, before = time.perf_counter(), os.getcwd()
    tally.tried += 1
    try:
        with _deadline(kind.deadline_s), warnings.catch_warnings():
            kind.attempt(case, folder)
        tally.worked += 1
    except FluxrunError as error:
        if problem := unclean(str(error)):
            _count(tally, AssertionError(f"{problem}: {str(error)[:SHOWN]!r}"), case, error)
        else:
            tally.refused += 1
    except (Exception, Hung) as error:  # the very thing that is looked for
        _count(tally, error, case, error)
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)
        took = time.perf_counter() - started
        tally.total_s += took
        if took > tally.slowest_s:
            tally.slowest_s, tally.slowest = took, ascii(case)[:SHOWN]


def unclean(text: str) -> str | None:
    """What a message of one line may not be, or None."""
    if not text.strip():
        return "an empty message"
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text):
        return "control characters in a message"
    return f"a message of {len(text)} characters" if len(text) > LONGEST_MESSAGE else None


def _count(tally: Tally, error: BaseException, case: Any, origin: BaseException) -> None:
    tally.failed += 1
    frames = [f for f in traceback.extract_tb(origin.__traceback__) if "/fluxrun/" in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
    text = " ".join(str(error).split())[:120]
    key = f"{type(error).__name__} {where} " + (re.sub(r"[\d'\"].*", "", text)[:60])
    known = tally.failures.setdefault(key, Failure(f"{type(error).__name__}: {text!a}", where, 0, ascii(case)[:SHOWN]))
    known.count += 1


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hung(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    faulthandler.dump_traceback_later(seconds * 10, exit=True, file=sys.__stderr__)  # what hangs outside of Python
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_kind(kind: Kind, cases: int, start: int, *, seconds: float = 1e9) -> Tally:
    """``cases`` different cases of a kind, in hypothesis' order for this seed; stops early after ``seconds``."""
    tally = Tally(kind.name, start)
    ends = time.monotonic() + seconds

    def one(case: Any) -> None:
        if tally.tried < cases and time.monotonic() < ends:
            attempt(kind, case, tally)

    _hypothesis(kind, cases, start)(one)()
    return tally


def _hypothesis(kind: Kind, cases: int, start: int) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    checks = [check for check in HealthCheck if check.name != "nested_given"]
    rules = settings(
        max_examples=cases, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=checks
    )
    return lambda body: seed(start)(rules(given(kind.cases)(body)))


def main() -> int:
    """Run the campaign, print a table, write it as JSON; the exit code says whether any case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--output", type=Path, default=Path("build/robustness.json"))
    parser.add_argument("kinds", nargs="*", help=f"which ones (default: all): {', '.join(kinds())}")
    given_ = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(f"seed {given_.seed}, {given_.cases} cases of each kind", flush=True)
    tallies = []
    for name in given_.kinds or kinds():
        tallies.append(try_kind(kinds()[name], given_.cases, given_.seed))
        _show(tallies[-1])
    given_.output.parent.mkdir(parents=True, exist_ok=True)
    given_.output.write_text(json.dumps([asdict(tally) for tally in tallies], indent=1) + "\n", encoding="utf-8")
    return int(any(tally.failed for tally in tallies))


def _show(tally: Tally) -> None:
    print(
        f"{tally.kind:<18}{tally.tried:>6} tried {tally.worked:>6} worked {tally.refused:>6} refused"
        f" {tally.failed:>6} failed {tally.slowest_s:>7.2f} s the slowest {tally.total_s:>7.0f} s in all",
        flush=True,
    )
    for failure in sorted(tally.failures.values(), key=lambda failure: -failure.count):
        print(f"  {failure.count:>5} × {failure.where} {failure.error}\n          {failure.example}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
