"""Ctrl+C and SIGTERM, or SIGKILL, at random moments through a real pty: how long it takes, what is left.

``make signals`` and ``make kills``. Nothing can answer a SIGKILL: what is on the disk has to be whole as it is, the
children have to see for themselves that they are alone, and the same command has to go on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import termios
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

import fluxrun

TAG = "FLUXRUN_CAMPAIGN"
"""The environment variable by which every process of a case is found, whoever its parent is by then."""

PATIENCE_S = 300
"""After this a case that has not ended is killed, and counts as one that never ends."""

SETTLE_S = 0.2
"""What a process that was killed may take to be gone."""

ORPHANED_S = 10.0
"""What the children of a process that was killed may take to end by themselves: a compiler ends its file."""

SOURCES = str(Path(fluxrun.__file__).parents[1])
"""The cases measure the fluxrun that this process has imported, wherever they run."""

SCREEN = 4000

CTRL_C = b"\x03"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
RUN = ("model=tiny", "height=64", "width=64", "model.max_sequence_length=32", "hydra.run.dir=run")
RESUMED = ("--multirun", *RUN[:-1], "sweep.resume=sweep", "seed=range(0,3)", "steps=20")
"""How a killed sweep goes on: a few of its jobs are enough."""
SWEEP = ("--multirun", *RUN[:-1], "hydra.sweep.dir=sweep", "seed=range(0,40)", "steps=20")


SET = ("steps=1", "batch_size=3", "num_images=200")
"""More images than run.json lists."""


class Terminal:
    """A fluxrun process with a terminal of its own, whose keys are ours."""

    def __init__(self, arguments: Sequence[str], folder: Path, extra: Mapping[str, str] | None = None) -> None:
        self.folder, self.tag, self.text = folder, uuid.uuid4().hex, ""
        self._master, slave = os.openpty()
        env = {**os.environ, TAG: self.tag, "COLUMNS": "200", "PYTHONPATH": SOURCES, **(extra or {})}

        def own_the_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where a shell started this one with &

        self.process = subprocess.Popen(
            [sys.executable, "-m", "fluxrun", *arguments], cwd=folder, env=env, stdin=slave, stdout=slave, stderr=slave,
            preexec_fn=own_the_terminal,  # noqa: PLW1509 - this process has no threads
        )  # fmt: skip
        os.close(slave)
        os.set_blocking(self._master, False)

    def read(self) -> None:
        """Take what is on the screen: a process whose terminal nobody reads would wait for it."""
        with contextlib.suppress(BlockingIOError, OSError):  # nothing there, or nobody behind it any more
            while data := os.read(self._master, 65536):
                self.text += data.decode(errors="replace")

    def until(self, what: Callable[[], bool], seconds: float = PATIENCE_S) -> bool:
        """Wait for something, or for the end of the process or the time; returns whether it came."""
        deadline = time.monotonic() + seconds
        while not (came := what()) and self.process.poll() is None and time.monotonic() < deadline:
            self.read()
            time.sleep(0.005)
        return came

    def send(self, number: signal.Signals) -> None:
        """Ctrl+C as a key, any other signal to the process."""
        if number == signal.SIGINT:
            os.write(self._master, CTRL_C)
        else:
            self.process.send_signal(number)

    def others(self) -> list[psutil.Process]:
        """Every process of this case but the first, alive and wherever it hangs in the tree."""
        return [other for other in tagged(self.tag) if other.pid != self.process.pid]

    def close(self) -> None:
        """End what is left, and the terminal."""
        for left in tagged(self.tag):
            with contextlib.suppress(psutil.Error):
                left.kill()
        self.process.wait()
        os.close(self._master)


def tagged(tag: str) -> list[psutil.Process]:
    """The living processes of one case."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # gone, or somebody else's
            if process.environ().get(TAG) == tag and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


# --- the moments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """What is running, what is waited for, and from then on how many seconds there are to choose from."""

    arguments: tuple[str, ...]
    begins: Callable[[Terminal], bool]
    seconds: float
    inductor: bool = False
    """Whether it compiles, each time with an empty cache."""
    goes_on: tuple[str, ...] = ()
    """What has to work where it was killed: sweep and run are resumed, the compiler's cache is used again."""


def _at_once(_: Terminal) -> bool:
    return True


def _recorded(terminal: Terminal) -> bool:
    return any(terminal.folder.glob("*/**/run.json"))


def _drawn(terminal: Terminal) -> bool:
    return any(terminal.folder.glob("*/**/images/*.png"))


def _compiling(terminal: Terminal) -> bool:
    return "Compiling" in terminal.text


def _completed(terminal: Terminal) -> bool:
    path = terminal.folder / "run" / "run.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["status"] == "completed"


MOMENTS: dict[str, Moment] = {
    "import": Moment((*RUN, "steps=400", "num_images=9"), _at_once, 4.0),
    "load": Moment((*RUN, "steps=400", "num_images=9"), _recorded, 6.0),
    "drawing": Moment((*RUN, "steps=400", "num_images=9"), _drawn, 3.0),
    "saving": Moment((*RUN, "steps=1", "num_images=2000"), _drawn, 3.0),
    "set": Moment((*RUN, *SET), _drawn, 8.0, goes_on=(*RUN[:-1], *SET, "resume=run")),
    "compile": Moment((*RUN, "steps=4", "compile=default"), _compiling, 15.0, inductor=True),
    "regional": Moment(
        (*RUN, "steps=4", "compile=regional"),
        _compiling,
        15.0,
        True,
        (*RUN[:-1], "hydra.run.dir=again", "steps=4", "compile=regional", "strict=true"),
    ),
    "end": Moment((*RUN, "steps=1"), _completed, 1.0),
    "sweep": Moment(SWEEP, _at_once, 15.0, goes_on=RESUMED),
    "isolated": Moment((*SWEEP, "sweep.isolation=process"), _at_once, 20.0, goes_on=RESUMED),
    "joblib": Moment((*SWEEP, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), _at_once, 20.0, goes_on=RESUMED),
}


# --- one case ---------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One signal: when it came, and what became of the process."""

    moment: str
    signal: str
    after_s: float
    took_s: float = 0.0
    code: int | None = None
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Command lines of processes that outlived it."""
    ended_before: bool = False
    screen: str = ""
    """The end of what was on it, where something is wrong."""


def attempt(name: str, number: signal.Signals, after_s: float) -> Case:
    """Start the command, send the signal at its moment, look at what is left."""
    case, moment = Case(name, number.name, round(after_s, 3)), MOMENTS[name]
    folder = Path(tempfile.mkdtemp(prefix="fluxrun-signal-"))
    extra = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TMPDIR": str(folder)} if moment.inductor else {}
    terminal = Terminal(moment.arguments, folder, extra)
    try:
        terminal.until(lambda: moment.begins(terminal))
        terminal.until(lambda: False, after_s)
        if terminal.process.poll() is not None:
            case.ended_before = True
            return case
        terminal.send(number)
        started = time.monotonic()
        terminal.until(lambda: False)
        case.code = terminal.process.poll()
        if number == signal.SIGKILL:
            wait_for_orphans(terminal)
        case.took_s = time.monotonic() - started
        _look(case, terminal)
        if number == signal.SIGKILL:
            case.wrong += broken_files(folder) + _go_on(moment, folder, extra)
    finally:
        terminal.close()
        shutil.rmtree(folder, ignore_errors=True)
    return case


def wait_for_orphans(terminal: Terminal) -> None:
    """Until nobody of a case is left that has to see for itself that it is alone, or the time for that is over."""
    deadline = time.monotonic() + ORPHANED_S
    while terminal.others() and time.monotonic() < deadline:
        terminal.read()  # they may still have something to say
        time.sleep(0.02)


def _look(case: Case, terminal: Terminal) -> None:
    time.sleep(SETTLE_S)
    terminal.read()
    for other in terminal.others():
        with contextlib.suppress(psutil.Error):
            case.left.append(" ".join(other.cmdline())[-160:])
    number = signal.Signals[case.signal]
    completed = case.code == 0 and case.moment == "end"
    if case.code not in (CODES.get(number), -number) and not completed:  # a shell says the same of both
        case.wrong.append(f"exit {case.code}")
    if "Traceback" in terminal.text:
        case.wrong.append("a traceback")
    if number != signal.SIGKILL:
        case.wrong += untrue_records(terminal.folder)
    if case.wrong or case.left:
        case.screen = terminal.text[-SCREEN:]


def broken_files(folder: Path) -> list[str]:
    """What a kill may not leave: half a record, half a picture, a record of a picture that is not there."""
    found = []
    for path in sorted([*folder.glob("*/**/run.json"), *folder.glob("*/sweep.json")]):
        name = str(path.relative_to(folder))
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            found.append(f"{name} is torn: {error}")
            continue
        if path.name == "run.json":
            pictures = [path.parent / image["path"] for image in images_of(path, record)]
            found += [f"{name} names {picture.name}, which is lost" for picture in pictures if not picture.exists()]
            unnamed = set((path.parent / "images").glob("[!.]*")) - set(pictures)
            found += [f"{name} does not name {len(unnamed)} pictures"] if len(unnamed) > 1 else []  # one is in flight
    for picture in sorted(folder.glob("*/**/images/*.png")):
        try:
            with Image.open(picture) as image:
                image.load()
        except (OSError, SyntaxError) as error:
            found.append(f"{picture.relative_to(folder)} names no whole picture: {error}")
    return found


def images_of(path: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The images of a record, those among them that are listed beside it."""
    beside = path.with_name("images.jsonl")
    lines = beside.read_bytes().split(b"\n")[:-1] if record.get("images_file") and beside.exists() else []
    return [*record.get("images", ()), *map(json.loads, lines)]


def _go_on(moment: Moment, folder: Path, extra: Mapping[str, str]) -> list[str]:
    """Run what has to work after the kill; what was completed has to be as it was. Returns what is wrong."""
    begun = ("run/run.json",) if "resume=run" in moment.goes_on else ("sweep", "inductor")
    if not moment.goes_on or not any((folder / name).exists() for name in begun):
        return []
    before = completed_runs(folder)
    terminal = Terminal(moment.goes_on, folder, extra)
    try:
        terminal.until(lambda: False)
        code, screen = terminal.process.poll(), terminal.text
    finally:
        terminal.close()
    wrong = [] if code == 0 else [f"going on ends with exit {code}: {screen[-400:]}"]
    after = completed_runs(folder)
    wrong += [f"going on says nothing of run {run}" for run in sorted(before - after)]
    wrong += [] if "--multirun" not in moment.goes_on or len(after) >= 3 else [f"going on names {len(after)} runs"]
    if "resume=run" in moment.goes_on:
        wrong += [] if len(after) == 1 else ["the run that went on is not completed"]
        wrong += untrue_records(folder)
    return wrong + broken_files(folder)


def completed_runs(folder: Path) -> set[str]:
    """The ids of the completed runs below a folder."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/**/run.json")]
    return {record["run_id"] for record in records if record["status"] == "completed"}


def untrue_records(folder: Path) -> list[str]:
    """What the records of a case say that is not so: every process of it has ended."""
    found = []
    for path in sorted([*folder.glob("*/**/run.json"), *folder.glob("*/sweep.json")]):
        record = json.loads(path.read_text(encoding="utf-8"))
        name = str(path.relative_to(folder))
        if record["status"] == "running":
            found.append(f"{name} says running")
        if path.name == "run.json":
            named = sorted(Path(image["path"]).name for image in images_of(path, record))
            there = sorted(image.name for image in (path.parent / "images").glob("*"))
            found += [f"{name} names {len(named)} pictures, there are {len(there)}"] if named != there else []
            asked = record.get("images_asked")
            if record["status"] == "completed" and asked not in (None, len(named)):
                found.append(f"{name} says completed with {len(named)} of {asked} images")
        elif any(job["status"] == "running" for job in record["jobs"]):
            found.append(f"{name} says of a job that it is running")
    return found


# --- the campaign -----------------------------------------------------------------------------------------------------


def main() -> int:
    """Run the campaign, print a table, write every case as JSON; the exit code says whether anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="signals in all, spread evenly over the moments")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--kill", action="store_true", help="SIGKILL instead of Ctrl+C and SIGTERM")
    parser.add_argument("--output", type=Path, default=Path("build/signals.json"))
    parser.add_argument("moments", nargs="*", help=f"which ones (default: all): {', '.join(MOMENTS)}")
    given = parser.parse_args()
    names = given.moments or list(MOMENTS)
    print(f"seed {given.seed}, {given.count} signals, load {os.getloadavg()[0]:.1f}, fluxrun of {SOURCES}", flush=True)
    os.environ.update(FLUXRUN_CACHE_DIR=tempfile.mkdtemp(prefix="fluxrun-signals-"), HF_HUB_OFFLINE="1")
    choose = random.Random(given.seed)
    numbers = [signal.SIGKILL] if given.kill else list(CODES)
    cases = []
    for number in range(given.count):
        name = names[number % len(names)]
        cases.append(attempt(name, choose.choice(numbers), 0.05 + choose.random() * MOMENTS[name].seconds))
        _show(cases[-1])
    shutil.rmtree(os.environ["FLUXRUN_CACHE_DIR"], ignore_errors=True)
    print(table(cases))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps([asdict(case) for case in cases], indent=1) + "\n", encoding="utf-8")
    return int(any(case.wrong or case.left for case in cases))


def _show(case: Case) -> None:
    what = "ended before" if case.ended_before else f"{case.took_s:6.2f} s, exit {case.code}"
    print(
        f"{case.moment:<10}{case.signal:<8}{case.after_s:>7.2f}  {what}  {case.wrong or ''} {case.left or ''}",
        flush=True,
    )


def table(cases: Sequence[Case]) -> str:
    """The summary: a row for each moment, and one for all."""
    lines = [f"\n{'moment':<10}{'n':>5}{'median':>9}{'p95':>8}{'max':>8}{'>1 s':>6}{'exit':>6}{'record':>8}{'left':>6}"]
    by_moment = {name: [c for c in cases if c.moment == name and not c.ended_before] for name in MOMENTS}
    by_moment["all"] = [case for case in cases if not case.ended_before]
    return "\n".join(lines + [_row(name, found) for name, found in by_moment.items() if found])


def _row(name: str, cases: Sequence[Case]) -> str:
    took = sorted(case.took_s for case in cases)
    p95 = took[min(len(took) - 1, int(0.95 * len(took)))]
    codes = sum(any(w.startswith("exit") for w in case.wrong) for case in cases)
    records = sum(any("says" in w or "names" in w for w in case.wrong) for case in cases)
    left = sum(bool(case.left) for case in cases)
    slow = sum(seconds > 1 for seconds in took)
    return (
        f"{name:<10}{len(took):>5}{statistics.median(took):>8.2f}s{p95:>7.2f}s{took[-1]:>7.2f}s"
        f"{slow:>6}{codes:>6}{records:>8}{left:>6}"
    )


if __name__ == "__main__":
    sys.exit(main())
