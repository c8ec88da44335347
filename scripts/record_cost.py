"""What an image costs in the record: seconds and bytes written, at a run's 10th, 1,000th and 10,000th image.

    python scripts/record_cost.py benchmarks/results/record_cost_cpu.json [--drawn PROMPTS]

``writer``: the record's writer alone, with images that nobody drew. What an image adds is its line in images.jsonl, and
run.json every ten seconds at most; beside it what was done up to schema_version 1: all of run.json, twice an image.
``drawn``: a prompt set on model=tiny, 64x64, two steps: seconds between two images and bytes that the process wrote for
one, its picture file left out, at the begin and at the end of the run. Bytes are the kernel's count (/proc/self/io).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import fluxrun
from fluxrun.atomic import write_atomically
from fluxrun.planning.prepare import prepare
from fluxrun.process.console import Reporter
from fluxrun.record.environment import environment
from fluxrun.record.folder import RunFolder
from fluxrun.record.schema import ImageLine
from fluxrun.record.writing import json_text

AT = (10, 1_000, 10_000)
REPEATS = 20
SMALL = ("model=tiny", "height=64", "width=64", "steps=2", "model.max_sequence_length=32")


def written_bytes() -> int:
    """Bytes that this process has handed to write() so far."""
    return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])


def a_line(index: int) -> ImageLine:
    """An image that nobody drew, as a run with four steps has it."""
    call = {"step_s": [0.0224, 0.0223, 0.0225, 0.0224], "denoise_s": 0.0898, "decode_s": 0.0199}
    return ImageLine.model_validate({
        "path": f"images/{index:03d}_seed0.png", "prompt": "a lighthouse at dusk, the sea calm, gulls above it",
        "seed": 0, "sha256": f"{index:064x}", "width": 1024, "height": 1024, "compressed_by": "isal",
        "file_bytes": 1_400_000, "line": index + 1, "number": 1, "save_s": 0.11, "calls": [call],
        "text_encode_s": [0.0123],
    })  # fmt: skip


def measured(do: Callable[[int], None], first: int, repeats: int) -> dict[str, float]:
    """Median milliseconds and mean bytes of one image."""
    seconds, before = [], written_bytes()
    for index in range(first, first + repeats):
        started = time.perf_counter()
        do(index)
        seconds.append(time.perf_counter() - started)
    return {
        "ms": round(statistics.median(seconds) * 1e3, 3),
        "bytes": round((written_bytes() - before) / repeats),
    }


def writer(folder: Path) -> list[dict[str, Any]]:
    """The writer alone, now and as it was."""
    config = fluxrun.compose([*SMALL])
    run = RunFolder(folder, config.source)
    plan = prepare(config).plan
    run.record.environment = environment(plan.machine)
    run.note_options(plan.record(), plan.notes)

    def now(index: int) -> None:
        run.add(a_line(index))
        if run.is_due:
            run.write()

    def before(index: int) -> None:
        was.images.append(a_line(index).image())
        was.timings.add(a_line(index))
        for _ in range(2):
            write_atomically(folder / "was.json", json_text(was))

    rows, index = [], 0
    for at in AT:
        for number in range(index, at):
            now(number)
        was = run.record.model_copy(deep=True)
        rows.append({
            "image": at, "now": measured(now, at, REPEATS), "until_version_1": measured(before, at, REPEATS)
        })  # fmt: skip
        index = at + REPEATS
    started = time.perf_counter()
    run.finish("completed")
    rows.append({"end_of_run_ms": round((time.perf_counter() - started) * 1e3, 1), "images": len(run.record.images)})
    return rows


class Clock(Reporter):
    """Notes when each picture was saved, how long its file is, and how much was written until then."""

    def __init__(self) -> None:
        self.saved_at: list[tuple[float, int]] = []
        self.files = 0

    def saved(self, path: Path, seed: int) -> None:
        """A picture is on the disk, and its line in the record."""
        self.files += path.stat().st_size
        self.saved_at.append((time.perf_counter(), written_bytes() - self.files))


def drawn(folder: Path, prompts: int) -> list[dict[str, Any]]:
    """A prompt set that is really drawn."""
    (folder / "prompts.txt").write_text("".join(f"a lighthouse at dusk, number {n}\n" for n in range(prompts)))
    clock = Clock()
    config = fluxrun.compose([*SMALL, f"prompts_file={folder / 'prompts.txt'}"])
    fluxrun.run(config, folder / "run", reporter=clock)
    rows = []
    for first in (10, prompts // 2, prompts - 51):
        part = clock.saved_at[first : first + 51]
        gaps = [(later[0] - earlier[0]) * 1e3 for earlier, later in pairwise(part)]
        each = (part[-1][1] - part[0][1]) / (len(part) - 1)
        images = f"{first}-{first + len(gaps)}"
        rows.append({"images": images, "ms": round(statistics.median(gaps), 1), "bytes": round(each)})
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--drawn", type=int, default=0, help="so many prompts are really drawn, too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found: dict[str, Any] = {"writer": writer(Path(name) / "writer")}
        if given.drawn:
            found["drawn"] = drawn(Path(name), given.drawn)
    about = {"command": " ".join(["python", *sys.argv]), "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    given.out.write_text(json.dumps({**about, **found}, indent=1) + "\n")
    print(given.out.read_text())


if __name__ == "__main__":
    main()
