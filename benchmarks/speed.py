"""Measures everything that fluxrun claims about speed, beside plain diffusers, on the GPU that is here.

    python benchmarks/speed.py OUT                                  # every section, about 15 minutes on an H100
    python benchmarks/speed.py OUT --only klein,vae --budget 240    # some of them, and the most seconds they may take
    python benchmarks/speed.py OUT --only klein --limits klein=300  # more time for a section: more of its settings
    python benchmarks/speed.py OUT --only klein --keep h100_fast --add "mine: quantization=fp8 compile=default"
    python benchmarks/speed.py OUT --only memory --keep "dev fp8 group 24"  # a row of that table, and its GB
    python benchmarks/speed.py OUT --model tiny                     # a dry run on any machine

Each section writes OUT/SECTION.json as it goes (raw samples, what was in effect, clocks before and after), so that a
run that is cut off keeps what it has. Sections start in order of importance until the budget is spent. Every setting
has a process of its own; settings that fit into the GPU's memory together are timed in turns (A B C, C B A, …), never
at the same time. ``summarize.py`` makes the summary, the tables and the plots.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]  # for the workers, which get this process's search path

import speed_settings as known  # noqa: E402
from speed_commands import first_images, memory_budgets  # noqa: E402
from speed_machine import gpu_memory_gb, gpu_state, versions  # noqa: E402
from speed_rounds import Rounds, Row, groups_that_fit  # noqa: E402
from speed_settings import Setting  # noqa: E402
from speed_worker import Job  # noqa: E402
from summary_tables import line_of, table_of  # noqa: E402


@dataclass
class Run:
    """One run of this script: where it writes, which models it uses, how much time is left."""

    out: Path
    models: dict[str, tuple[str, ...]]
    tiny: bool
    deadline: float
    keep: list[str] | None
    added: tuple[Setting, ...]
    limits: dict[str, float]
    rounds: int
    alone: bool
    command: list[str]
    work: Path
    """A temporary folder, for what the settings are compared with."""
    versions: dict[str, Any] = field(default_factory=versions)

    def until(self, section: str) -> float:
        """The time at which ``section`` begins nothing new."""
        seconds = self.limits.get(section, SECTIONS[section].seconds)
        return min(self.deadline, time.monotonic() + seconds)

    def settings(self, *settings: Setting) -> tuple[Setting, ...]:
        """Those that ``--keep`` lets through."""
        return known.chosen(settings, self.keep)

    def job(self, task: str, model: str, steps: int = 4) -> Callable[[Setting], Job]:
        """What a worker needs to know, for each setting."""

        def job(setting: Setting) -> Job:
            log = self.out / "logs" / f"{task}_{model}_{setting.name}.log"
            return Job(setting, task, self.models[model], self.work / model, log, steps)

        return job


class Section:
    """A section's JSON file, rewritten with every new measurement."""

    def __init__(self, run: Run, name: str) -> None:
        self._path = run.out / f"{name}.json"
        self._content: dict[str, Any] = {
            "section": name,
            "command": run.command,
            "tiny": run.tiny,
            "versions": run.versions,
            "before": gpu_state(),
            "between": [],
            "after": None,
            "seconds": None,
            "rows": [],
        }
        self._started = time.monotonic()

    def save(self, rows: list[Row]) -> None:
        """Write these rows."""
        self._content["rows"] = rows
        self._content["seconds"] = round(time.monotonic() - self._started, 1)
        text = json.dumps(self._content, indent=1, default=str) + "\n"
        unfinished = self._path.with_suffix(".part")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(self._path)

    def note_state(self) -> None:
        """Note the device's clocks and power; written with what is measured next."""
        self._content["between"].append(gpu_state())

    def add(self, row: Row) -> None:
        """Write one more row, and say it."""
        self.save([*self._content["rows"], row])
        say(row)

    def close(self) -> None:
        """Write the device's state at the end."""
        self._content["after"] = gpu_state()
        self.save(self._content["rows"])


def say(row: Row) -> None:
    """One line on the screen."""
    print("  " + line_of(row), flush=True)


# -- sections -------------------------------------------------------------------------------------------------------


def roofline(run: Run, section: Section) -> None:
    """What the device can do at all."""
    turns = rounds_of(run, section, "roofline", run.job("roofline", "klein_4b"))
    turns.rounds, turns.say = 1, lambda row: None
    turns.one_at_a_time([known.PLAIN], passes=1)
    rows = [row for turn in turns.rows[0]["samples"].get("ceilings", []) for row in turn]
    section.save(rows or turns.rows)
    for row in rows:
        say(row)


def klein(run: Run, section: Section) -> None:
    """klein-4B, one step: groups of settings side by side."""
    turns = rounds_of(run, section, "klein", run.job("steps", "klein_4b"))
    first, *rest = known.KLEIN
    groups = [run.settings(*group) for group in ((*first, *run.added), *rest)]
    groups = [group for n, group in enumerate(groups) if n == 0 or len(group) > 1]
    side_by_side(run, turns, groups, known.KLEIN_GB)


def dev(run: Run, section: Section) -> None:
    """dev, one step: one setting at a time, then the same in the opposite order."""
    turns = rounds_of(run, section, "dev", run.job("steps", "dev", steps=5), rounds=1)
    turns.one_at_a_time(run.settings(*known.DEV, *run.added))


def vae(run: Run, section: Section) -> None:
    """VAE decode."""
    turns = rounds_of(run, section, "vae", run.job("decode", "klein_4b"))
    side_by_side(run, turns, [run.settings(*known.VAE)], known.KLEIN_GB)


def image(run: Run, section: Section) -> None:
    """klein-4B, prompt to PIL image, text encoder included."""
    turns = rounds_of(run, section, "image", run.job("image", "klein_4b"))
    gigabytes = known.KLEIN_GB + known.TEXT_ENCODER_GB
    side_by_side(run, turns, [run.settings(*known.IMAGE, *run.added)], gigabytes)


def files(run: Run, section: Section) -> None:
    """klein-4B, prompts to PNG files: everything a user waits for."""
    turns = rounds_of(run, section, "files", run.job("files", "klein_4b"), rounds=3)
    gigabytes = known.KLEIN_GB + known.TEXT_ENCODER_GB
    side_by_side(run, turns, [run.settings(*known.IMAGE)], gigabytes)


def long(run: Run, section: Section) -> None:
    """dev, embeddings to PIL image, all 50 steps: half of them computed, against plain diffusers."""
    turns = rounds_of(run, section, "long", run.job("long", "dev", steps=6 if run.tiny else 50), rounds=3)
    steps = ("steps=6",) if run.tiny else ()
    settings = [s if s.recipe else known.fluxrun(s.name, *s.overrides, *steps) for s in known.LONG]
    turns.one_at_a_time(run.settings(*settings), passes=1)


def first_image(run: Run, section: Section) -> None:
    """The first image of a new process, compiled code at hand or not."""
    settings = [s for s in run.settings(*known.FIRST_IMAGE) if s.recipe is None]
    log = run.out / "logs" / "first_image.log"
    first_images(settings, run.models["klein_4b"], run.until("first_image"), section.add, log)


def sizes(run: Run, section: Section) -> None:
    """klein-4B at several sizes in one process each, with what was compiled or captured again."""
    sweep = ((64, 64), (64, 96), (96, 96)) if run.tiny else known.SIZE_SWEEP
    turns = rounds_of(run, section, "sizes", run.job("sizes", "klein_4b"))
    settings = [s for s in run.settings(*known.SIZES) if s.recipe is None]
    turns.at_each(settings, sweep)


def memory(run: Run, section: Section) -> None:
    """Models under a limit on the GPU's memory, by where their weights lie."""
    until = run.until("memory")
    rows = [row for row in known.MEMORY if run.keep is None or f"{row.key} {row.budget_gb:g}" in run.keep]
    memory_budgets(rows, run.models, until, section.add, run.out / "logs" / "memory.log")


def rounds_of(run: Run, section: Section, name: str, jobs: Callable[[Setting], Job], rounds: int = 0) -> Rounds:
    """Turns in this section; ``--rounds`` overrides how many."""
    number = run.rounds or rounds or 5
    return Rounds(jobs, run.until(name), section.save, number, say=say, after_round=section.note_state)


def side_by_side(run: Run, turns: Rounds, groups: Sequence[Sequence[Setting]], gigabytes: float) -> None:
    """Every group that fits, and once more, beside plain diffusers alone, whoever found too little memory.

    On a device that holds no two of them, or with ``--alone``, one after the other.
    """
    room = gpu_memory_gb(gpu_state())
    if run.alone or (room is not None and room < 2 * gigabytes):
        turns.one_at_a_time(list(dict.fromkeys(setting for group in groups for setting in group)))
        return
    again: list[Setting] = []
    for number, group in enumerate(groups_that_fit(groups, gigabytes, room)):
        if number and turns.left < LEAST_S:
            turns.leave_out(group[1:], number, "out of time")
        else:
            again += turns.side_by_side(group, number)
    for number, setting in enumerate(s for s in again if s.name != known.REFERENCE):
        turns.side_by_side([known.PLAIN, setting], 100 + number)


LEAST_S = 35.0
"""Seconds below which another group is not worth starting: importing and building alone take most of them."""


@dataclass(frozen=True)
class Kind:
    """A section's function and the seconds after which it begins nothing new."""

    measure: Callable[[Run, Section], None]
    seconds: float


SECTIONS = {
    "roofline": Kind(roofline, 60),
    "klein": Kind(klein, 150),
    "vae": Kind(vae, 90),
    "image": Kind(image, 100),
    "files": Kind(files, 90),
    "dev": Kind(dev, 190),
    "long": Kind(long, 120),
    "first_image": Kind(first_image, 180),
    "sizes": Kind(sizes, 100),
    "memory": Kind(memory, 420),
}
"""In order of importance, with little enough before the first great ones."""


def main() -> int:
    """Run the sections asked for; 1 if a section broke."""
    given = arguments()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Workers leave without farewells: what multiprocessing then says about their semaphores is of no use.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    given.out.mkdir(parents=True, exist_ok=True)
    broken = 0
    with tempfile.TemporaryDirectory(prefix="fluxrun-speed-") as work:
        run = run_of(given, Path(work))
        for name in given.only or SECTIONS:
            if run.deadline - time.monotonic() <= 0:
                print(f"{name}: not measured, the budget of {given.budget:.0f} s is spent", flush=True)
                continue
            broken += not measured(run, name)
    print("\n" + table_of(given.out), flush=True)
    return int(broken > 0)


def measured(run: Run, name: str) -> bool:
    """One section; whether it came to its end. What breaks one section does not stop the next."""
    print(f"{name}: {(SECTIONS[name].measure.__doc__ or '').splitlines()[0]}", flush=True)
    section = Section(run, name)
    started = time.monotonic()
    try:
        SECTIONS[name].measure(run, section)
    except Exception as error:  # said on the screen and in the exit code; the measurements so far are in the file
        print(f"  {name} broke: {type(error).__name__}: {error}", flush=True)
        return False
    finally:
        section.close()
    print(f"  ({time.monotonic() - started:.0f} s)", flush=True)
    return True


def run_of(given: argparse.Namespace, work: Path) -> Run:
    """The run that the command line asks for."""
    tiny = given.model == "tiny"
    return Run(
        out=given.out,
        models=known.TINY_MODELS if tiny else known.MODELS,
        tiny=tiny,
        deadline=time.monotonic() + given.budget,
        keep=given.keep,
        added=tuple(given.add),
        limits=given.limits,
        rounds=given.rounds,
        alone=given.alone,
        command=["python", "benchmarks/speed.py", *sys.argv[1:]],
        work=work,
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that is written")
    parser.add_argument("--only", type=section_names, help=f"comma-separated: {', '.join(SECTIONS)}")
    parser.add_argument("--model", choices=("real", "tiny"), default="real", help="tiny: a dry run on any machine")
    parser.add_argument("--budget", type=float, default=1500, help="seconds after which no section starts")
    parser.add_argument("--limits", type=limits, default={}, help="seconds per section: klein=240,dev=300")
    parser.add_argument("--keep", type=lambda text: text.split(","), help="settings to measure beside plain diffusers")
    parser.add_argument(
        "--add", type=known.parse_setting, action="append", default=[], help="'name: override …' for klein, dev, image"
    )
    parser.add_argument("--rounds", type=int, default=0, help="turns of each setting (0: the section's own number)")
    parser.add_argument("--alone", action="store_true", help="one setting at a time, whatever the memory holds")
    given = parser.parse_args()
    if given.keep is not None:
        given.keep += [setting.name for setting in given.add]
    return given


def section_names(text: str) -> list[str]:
    """The sections named, in the order of ``SECTIONS``."""
    names = text.split(",")
    if unknown := set(names) - SECTIONS.keys():
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in names]


def limits(text: str) -> dict[str, float]:
    """``klein=240,dev=300`` as a dictionary."""
    return {name: float(seconds) for name, seconds in (part.split("=") for part in text.split(","))}


if __name__ == "__main__":
    sys.exit(main())
