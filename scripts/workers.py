"""Prompt sets over Ray's workers: every picture once after a kill, figures flat from first to last, pictures an hour.

    python scripts/workers.py prompts OUT.json [--prompts 5000] [--workers 2]     # model=tiny, CPUs; killed once
    python scripts/workers.py rate OUT.json [--images 400] [--counts 1 2]         # klein-4B at real size, a GPU each
    python scripts/workers.py rate OUT.json --tiny                                # a dry run of that on CPUs
    python scripts/workers.py driver OUT.json [--prompts 10000] [--workers 2]     # what the command itself can take

``prompts``: the command draws a prompt set, gets SIGKILL at two fifths of it, and is given again with ``resume=``.
Whether each picture is there once and none that was recorded was written again; seconds between pictures and bytes that
the driver wrote for one (the kernel's count), in fifths of the run; what a part costs beside its pictures.
``rate``: pictures an hour from the second tenth of a run to the ninth, for each number of workers, and the ratio to
one. Random weights in both.
``driver``: workers that draw nothing tell of pictures as fast as they can; the driver's seconds, of all and of the CPU,
for a picture and for a part. The last line on the screen is the result in one line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fluxrun
import fluxrun.config.shards as shards_module
import fluxrun.workers.prompts as prompts_module
from fluxrun.config.schema import WorkersConfig
from fluxrun.hardware.detection import detect
from fluxrun.record.folder import RunFolder, read_record
from fluxrun.record.schema import ImageLine, RunRecord
from fluxrun.workers.actor import TOGETHER_S, Saved, Tell
from fluxrun.workers.pool import Task
from fluxrun.workers.prompts import Part, PromptSet

TINY = ("model=tiny", "height=64", "width=64", "steps=2", "model.max_sequence_length=32")
REAL = ("+preset=h100_fast", "model=flux2_klein_4b", "model.weights=random", "height=1024", "width=1024")
KILLED_AT = 0.4
LOOK_S = 0.5
LINE = re.compile(r"^\[(\S+ \S+?)\]\S* (saved|options, model and size as before)", re.MULTILINE)
"""A worker's lines for a picture, and for the begin of a part that is not its first."""


# --- one command ------------------------------------------------------------------------------------------------------


class Command:
    """A fluxrun process, watched from outside."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.run, self.samples = folder / "run", []
        self._screen = (folder / "screen.txt").open("a")
        self._started = time.monotonic()
        line = [sys.executable, "-m", "fluxrun", *arguments]
        self.process = subprocess.Popen(line, cwd=folder, stderr=self._screen, stdout=self._screen)
        self.samples: list[tuple[float, int, int]]
        """Seconds since the start, pictures on the disk, bytes that the process has handed to write()."""

    def follow(self, kill_at: int | None = None) -> int:
        """Wait for its end, or end it once so many pictures are there; returns its exit code."""
        while self.process.poll() is None:
            drawn = count(self.run / "images")
            written = _written(self.process.pid)
            self.samples.append((time.monotonic() - self._started, drawn, written))
            if kill_at is not None and drawn >= kill_at:
                self.process.kill()
            time.sleep(LOOK_S)
        self._screen.close()
        return self.process.wait()


def count(folder: Path) -> int:
    """How many finished pictures a folder has."""
    return sum(entry.name.endswith(".png") for entry in os.scandir(folder)) if folder.is_dir() else 0


def _written(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/io").read_text().split("wchar:")[1].split()[0])
    except (OSError, IndexError):
        return 0


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompts(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Draw, kill, go on, and see what is there."""
    file = folder / "prompts.txt"
    file.write_text("".join(f"a red circle, number {n}\n" for n in range(given.prompts)))
    line = (*TINY, f"prompts_file={file}", f"workers={given.workers}")
    first = Command(folder, *line, "hydra.run.dir=run")
    first.follow(kill_at=round(KILLED_AT * given.prompts))
    killed_after = read_record(first.run)
    recorded = {image.path: (first.run / image.path).stat().st_mtime_ns for image in killed_after.images}
    second = Command(folder, *line, "resume=run")
    code = second.follow()
    record = read_record(first.run)
    again = sum((first.run / path).stat().st_mtime_ns != when for path, when in recorded.items())
    seen = [image.identity for image in record.images]
    times = drawing_times(first.run)
    return {
        "prompts": given.prompts, "workers": given.workers, "exit_code": code, "status": record.status,
        "recorded_when_killed": len(recorded), "on_disk_when_killed": first.samples[-1][1],
        "pictures": len(seen), "different_pictures": len(set(seen)), "files": count(first.run / "images"),
        "recorded_and_drawn_again": again,
        "by_fifth": [*fifths(first.samples, "first command"), *fifths(second.samples, "second command")],
        **times,
        "whole_s": round(second.samples[-1][0] + first.samples[-1][0], 1),
    }  # fmt: skip


def fifths(samples: Sequence[tuple[float, int, int]], name: str) -> list[dict[str, Any]]:
    """Seconds and bytes a picture, from the first sample with a new picture on, in five parts."""
    most = samples[-1][1]
    closing = next(place for place, sample in enumerate(samples) if sample[1] == most)
    begun = [sample for sample in samples[: closing + 1] if sample[1] > samples[0][1]]
    if len(begun) < 6:
        return []
    first, last = begun[0][1], begun[-1][1]
    rows = []
    for part in range(5):
        low, high = (first + (last - first) * edge // 5 for edge in (part, part + 1))
        inside = [sample for sample in begun if low <= sample[1] <= high]
        if len(inside) > 1 and inside[-1][1] > inside[0][1]:
            (began, drawn, written), (ended, drawn_then, written_then) = inside[0], inside[-1]
            number = drawn_then - drawn
            rows.append({
                "of": name, "pictures": f"{drawn}-{drawn_then}",
                "ms_per_picture": round((ended - began) * 1e3 / number, 1),
                "driver_bytes_per_picture": round((written_then - written) / number),
            })  # fmt: skip
    return rows


def drawing_times(run: Path) -> dict[str, Any]:
    """What a worker needs between two pictures of a part, and what is on top of that between two parts."""
    inner: list[float] = []
    between: list[float] = []
    for file in run.glob("fluxrun.worker-*.log"):
        before, is_new = None, False
        for when, what in LINE.findall(file.read_text(encoding="utf-8")):
            now = datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").timestamp()
            if what != "saved":
                is_new = True
                continue
            if before is not None:
                (between if is_new else inner).append(now - before)
            before, is_new = now, False
    if not inner:
        return {}
    usual = statistics.median(inner)
    found: dict[str, Any] = {"worker_ms_per_picture": round(usual * 1e3, 1)}
    if between:
        on_top = statistics.median(between) - usual
        found |= {"parts_begun_after_another": len(between), "ms_per_part_on_top": round(on_top * 1e3, 1)}
    return found


# --- rate -------------------------------------------------------------------------------------------------------------


def rate(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pictures an hour for each number of workers."""
    options, rows = TINY if given.tiny else (*REAL, *given.options), []
    for workers in given.counts:
        images = given.images * workers
        at = folder / str(workers)
        at.mkdir()
        command = Command(at, *options, f"num_images={images}", f"workers={workers}", "hydra.run.dir=run")
        if code := command.follow():
            raise SystemExit(f"workers={workers} ended with {code}:\n{(at / 'screen.txt').read_text()}")
        rows.append({"workers": workers, **paced(command.run), **drawing_times(command.run)})
    best = {row["workers"]: row["pictures_an_hour"] for row in rows}
    return {"options": options, "rows": rows, "ratios": {w: round(r / best[min(best)], 3) for w, r in best.items()}}


def paced(run: Path) -> dict[str, Any]:
    """Pictures an hour between the first and the last tenth, by when the files were written, and what came before."""
    record = read_record(run)
    saved = sorted((run / image.path).stat().st_mtime for image in record.images)
    tenth = len(saved) // 10
    seconds = saved[-1 - tenth] - saved[tenth]
    started = datetime.fromisoformat(record.started_at).timestamp()
    return {
        "pictures": len(saved), "pictures_an_hour": round((len(saved) - 1 - 2 * tenth) / seconds * 3600, 1),
        "seconds_to_the_first": round(saved[0] - started, 1), "whole_s": round(saved[-1] - started, 1),
        "effective": {group: option.effective for group, option in record.options.items()},
        "load_s": record.timings.load_s, "first_call_s": record.timings.first_call_s,
        "denoise_s": statistics.median(record.timings.denoise_s),
        "decode_s": statistics.median(record.timings.decode_s), "save_s": statistics.median(record.timings.save_s),
        "gpu": record.environment.get("gpu"),
    }  # fmt: skip


# --- driver -----------------------------------------------------------------------------------------------------------


@dataclass
class Telling:
    """A worker's part without drawing: a line for each picture, as a picture of four steps has it."""

    apart_s: float = 0.0
    own_options: bool = True

    def __call__(self, task: Part, tell: Tell, pool: object) -> RunRecord:
        """Tell of all of the part's pictures."""
        call = {"step_s": [0.0358, 0.0357, 0.0359, 0.0358], "denoise_s": 0.1432, "decode_s": 0.0263}
        for job in task.shard.jobs:
            time.sleep(self.apart_s)
            tell(Saved(ImageLine.model_validate({
                "path": f"images/{job.index:03d}_seed{job.seed}.png", "prompt": job.prompt, "seed": job.seed,
                "sha256": f"{job.index:064x}", "width": 1024, "height": 1024, "compressed_by": "isal",
                "file_bytes": 1_400_000, "line": job.line, "number": job.number, "save_s": 0.028, "calls": [call],
                "text_encode_s": [0.0167],
            })))  # fmt: skip
        return RunRecord(run_id="0" * 12, started_at="", config={}, config_hash="")


class Heard(PromptSet):
    """A prompt set that notes when it has heard of the first thing, and of the last."""

    first: tuple[float, float] | None = None
    last: tuple[float, float] = (0.0, 0.0)

    def hear(self, task: Task, event: Any) -> None:
        """As ever, between two looks at the clocks."""
        self.first = self.first or (time.perf_counter(), time.process_time())
        super().hear(task, event)
        self.last = (time.perf_counter(), time.process_time())


def driver(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """How many pictures a second the driver can hear of, and what it does for each part."""
    most, workers = given.prompts, given.workers
    parts = heard(folder / "parts", workers, most // 100, images=1)
    together = heard(folder / "together", workers, most, images=100)
    apart = heard(folder / "apart", workers, most // 100, images=100, apart_s=TOGETHER_S * 1.05)
    part, picture, message = (row["cpu_s"] / row["pictures"] * 1e3 for row in (parts, together, apart))
    return {
        "workers": workers, "rows": [parts, together, apart],
        "driver_cpu_ms": {
            "a picture, many in a message": round(picture, 3), "a picture, alone in its message": round(message, 3),
            "a part of one picture": round(part, 3),
        },
        "pictures_a_second_heard": round(together["pictures"] / together["seconds"]),
    }  # fmt: skip


def heard(folder: Path, workers: int, number: int, *, images: int, apart_s: float = 0.0) -> dict[str, Any]:
    """The driver's seconds for so many pictures in parts of ``images``."""
    shards_module.MOST_IMAGES = images
    prompts_module.PartWork = lambda *_: Telling(apart_s)  # type: ignore[assignment,misc]
    folder.mkdir()
    file = folder / "prompts.txt"
    file.write_text("".join(f"a lighthouse at dusk, the sea calm, gulls above it, {n}\n" for n in range(number)))
    config = fluxrun.compose([*TINY, f"prompts_file={file}"])
    told = Heard(config, RunFolder(folder / "run", config.source), None)
    told.draw(WorkersConfig(workers=workers))
    assert told.first is not None
    seconds, cpu = (last - first for first, last in zip(told.first, told.last, strict=True))
    took = {"seconds": round(seconds, 3), "cpu_s": round(cpu, 3)}
    return {"images_a_part": images, "apart_s": apart_s, "pictures": number, **took}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prompts", "rate", "driver"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=400, help="for each worker")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--options", nargs="*", default=[], help="further overrides of rate")
    given = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory(prefix="fluxrun-workers-") as name:
        found = {"prompts": prompts, "rate": rate, "driver": driver}[given.what](given, Path(name))
    machine = detect()
    about = {
        "command": " ".join(["python", *sys.argv]), "cpu": machine.cpu, "cpus": machine.cpu_count,
        "gpus": [gpu.name for gpu in machine.gpus], "load_before": load, "threads": os.environ.get("OMP_NUM_THREADS"),
    }  # fmt: skip
    given.out.write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
