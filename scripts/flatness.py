"""Whether long work stays as it began: memory, open files, time per picture, by quarter, of a long run and a sweep.

    python scripts/flatness.py OUT.json [--pictures 1000] [--jobs 300]

Both are ordinary fluxrun processes over the bundled model, looked at from outside. A picture's time is what lies
between its file and the one before; processor time beside it, as other processes do not disturb that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

SMALL = ("model=shapes", "steps=2", "height=64", "width=64")
EVERY_S = 0.2
QUARTERS = 4

Sample = tuple[float, int, int, float]
"""Seconds since the epoch, bytes resident, open files, seconds of processor time."""


def watched(arguments: Sequence[str], folder: Path) -> tuple[int, list[Sample]]:
    """Run fluxrun in a folder to its end; its exit code and what was seen of it."""
    with (folder / "stderr.txt").open("w") as errors:
        child = psutil.Popen([sys.executable, "-m", "fluxrun", *arguments], cwd=folder, stderr=errors)
        samples: list[Sample] = []
        while child.poll() is None:
            try:
                with child.oneshot():
                    spent = child.cpu_times()
                    sample = (time.time(), child.memory_info().rss, child.num_fds(), spent.user + spent.system)
            except psutil.Error:  # it is just ending
                break
            samples.append(sample)
            time.sleep(EVERY_S)
    return child.wait(), samples


def quarters(pictures: Sequence[float], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """What was seen while each quarter of the pictures was drawn; ``pictures`` are the times at which they came."""
    found = []
    for number in range(QUARTERS):
        begin, end = (round(len(pictures) * part / QUARTERS) for part in (number, number + 1))
        times = pictures[max(0, begin - 1) : end]
        within = [sample for sample in samples if times[0] <= sample[0] <= times[-1]]
        if not within:
            raise SystemExit(f"pictures {begin} to {end} came within {EVERY_S} s: give more of them")
        spent = within[-1][3] - within[0][3]
        share = (within[-1][0] - within[0][0]) / (times[-1] - times[0]) if times[-1] > times[0] else 1.0
        found.append({
            "pictures": end - begin,
            "median_ms": round(statistics.median(b - a for a, b in pairwise(times)) * 1e3, 1),
            "processor_ms": round(spent / share / (end - begin) * 1e3, 1) if share else None,
            "rss_mib": round(statistics.median(sample[1] for sample in within) / 2**20, 1),
            "open_files": max(sample[2] for sample in within),
        })  # fmt: skip
    return found


def part(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """One long command: its quarters, as a result and on the screen."""
    with tempfile.TemporaryDirectory(prefix="fluxrun-flat-") as place:
        code, samples = watched(arguments, Path(place))
        pictures = sorted(path.stat().st_mtime for path in Path(place).glob("*/**/images/*.png"))
        if code or not pictures:
            raise SystemExit(f"{name}: exit {code}\n{(Path(place) / 'stderr.txt').read_text()[-2000:]}")
    result = quarters(pictures, samples)
    print(f"{name}: fluxrun {' '.join(arguments)}")
    for number, quarter in enumerate(result, 1):
        print(f"  {number}: " + ", ".join(f"{key} {value}" for key, value in quarter.items()), flush=True)
    return {"command": ["fluxrun", *arguments], "exit_code": code, "pictures": len(pictures), "quarters": result}


def main() -> None:
    """Run both, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=300)
    given = parser.parse_args()
    result = {
        "command": ["python", "scripts/flatness.py", *sys.argv[1:]],
        "cores": os.cpu_count(),
        "run": part("one run", [*SMALL, f"num_images={given.pictures}", "hydra.run.dir=run"]),
        "sweep": part("one sweep", ["--multirun", *SMALL, f"seed=range(0,{given.jobs})", "hydra.sweep.dir=sweep"]),
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
