"""Measures everything that fluxrun claims about speed, beside plain diffusers, on the GPU that is here.

    python benchmarks/speed.py OUT                                   # every section, about 15 minutes on an H100
    python benchmarks/speed.py OUT --only klein --budget 300         # some of them; more or less time than they have
    python benchmarks/speed.py OUT --only klein --keep h100_fast "mine: quantization=fp8 compile=default"
    python benchmarks/speed.py OUT --only memory --keep "dev fp8 group 24"   # a row of that table, and its GB
    python benchmarks/speed.py OUT --model tiny                      # a dry run on any machine

Each section writes OUT/SECTION.json as it goes (raw samples, what was in effect, clocks before and after), so that a
run that is cut off keeps what it has. Every setting has a process of its own; settings that fit into the GPU's memory
together are timed in turns (A B C, C B A, …), never at the same time. ``summarize.py`` makes tables and plots of it.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.results import read
from bench.section import Run, gpu_state
from bench.sections import SECTIONS
from bench.settings import Kept
from bench.summary import summary, targets_table


def main(line: Sequence[str]) -> int:
    """Run the sections asked for; 1 if a section broke."""
    given = arguments(line)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    usual, ends, broken = sum(SECTIONS[name].seconds for name in given.only), time.monotonic(), 0
    for name in given.only:
        ends += SECTIONS[name].seconds * (given.budget or usual) / usual
        broken += not measured(given, line, name, ends - time.monotonic())
    print(f"\n{targets_table(summary(read([given.out], tiny=True)))}", flush=True)
    if given.model == "tiny":
        print("(a dry run with tiny models: no figure means anything)")
    return int(broken > 0)


def measured(given: argparse.Namespace, line: Sequence[str], name: str, seconds: float) -> bool:
    """One section; whether it came to its end. What breaks one section does not stop the next."""
    section, command = SECTIONS[name], ["python", "benchmarks/speed.py", *line]
    print(f"{name}: {section.about}", flush=True)
    with tempfile.TemporaryDirectory(prefix="fluxrun-speed-") as work:
        tiny, keep = given.model == "tiny", Kept(given.keep)
        run = Run(section, given.out, Path(work), command, keep=keep, seconds=seconds, tiny=tiny)
        try:
            section.measure(run)
        except Exception as error:  # said on the screen and in the exit code; the measurements so far are in the file
            print(f"  {name} broke: {type(error).__name__}: {error}", flush=True)
            return False
        finally:
            run.content["after"] = gpu_state()
            run.save()
    return True


def arguments(line: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that is written")
    parser.add_argument("--only", type=section_names, default=list(SECTIONS), help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--model", choices=("real", "tiny"), default="real", help="tiny: a dry run on any machine")
    parser.add_argument("--budget", type=float, help="seconds, shared by the sections in proportion to their own")
    parser.add_argument("--keep", nargs="+", default=[], help="settings to measure beside plain diffusers, or new ones")
    return parser.parse_args(line)


def section_names(text: str) -> list[str]:
    """The sections named, in the order of ``SECTIONS``."""
    names = text.split(",")
    if unknown := set(names) - SECTIONS.keys():
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in names]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
