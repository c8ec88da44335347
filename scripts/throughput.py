"""Latency and throughput by batch size, and guidance in one call a step against two, with the bundled model.

    python scripts/throughput.py OUT.json [key=value …]

Every setting is drawn in turns (forwards, then backwards), so that a busy machine is busy for all of them; each figure
is the median over all turns, with the fastest beside it. Guidance is measured with the same weights under an index that
says they are not distilled: the speed of a klein base model of that size, no picture.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fluxrun
from fluxrun.options.model import BUNDLED
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.record.schema import RunRecord

BATCHES = (1, 2, 4, 8)
SIZES = (64, 128, 256)
TURNS = 3
READ = ("model.text_encoder_out_layers=[2,4,6]", "model.max_sequence_length=64", "model.dtype=auto")


def undistilled(folder: Path) -> Path:
    """The bundled weights, under an index that says that they are not distilled."""
    shapes = next(root / "shapes" for root in BUNDLED if (root / "shapes").is_dir())
    for part in shapes.iterdir():
        if part.name != "model_index.json":
            (folder / part.name).symlink_to(part)
    index = json.loads((shapes / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": False}))
    return folder


def in_turns(settings: Mapping[str, Sequence[str]], folder: Path) -> dict[str, list[RunRecord]]:
    """Every setting's runs, forwards and backwards in turns, over weights loaded once."""
    records: dict[str, list[RunRecord]] = {name: [] for name in settings}
    with SessionPool() as pool:
        for turn in range(TURNS):
            for name in list(settings)[:: 1 if turn % 2 == 0 else -1]:
                config = fluxrun.compose([*settings[name], "measure.warmup=1", "measure.repeats=3"])
                records[name].append(fluxrun.run(config, folder / f"{name}-{turn}", pool=pool))
    return records


def figures(values: Sequence[float]) -> dict[str, Any]:
    """Median and fastest of some seconds, and the seconds themselves."""
    return {"median": statistics.median(values), "min": min(values), "n": len(values), "samples": list(values)}


def by_batch(batch: int, records: Sequence[RunRecord]) -> dict[str, Any]:
    """Seconds until a batch's pictures are there, and pictures a second."""
    calls = [a + b for r in records for a, b in zip(r.timings.denoise_s, r.timings.decode_s, strict=True)]
    steps = [seconds for record in records for call in record.timings.step_s for seconds in call]
    return {
        "batch_size": batch,
        "latency_s": figures(calls),
        "step_s": figures(steps),
        "images_per_s": batch / statistics.median(calls),
        "peak_bytes": max(record.memory.peak_allocated_bytes for record in records),
    }


def guidance(size: int, two: Sequence[RunRecord], one: Sequence[RunRecord]) -> dict[str, Any]:
    """A step's seconds as two calls of the transformer and as one; the first step of each call is not counted."""
    steps = [[s for r in records for call in r.timings.step_s for s in call[1:]] for records in (two, one)]
    return {
        "size": size,
        "two_calls_s": figures(steps[0]),
        "one_call_s": figures(steps[1]),
        "speed_up": statistics.median(steps[0]) / statistics.median(steps[1]),
        "same_pixels": two[0].images[0].sha256 == one[0].images[0].sha256,
    }


def main(out: Path, more: Sequence[str]) -> None:
    """Measure both and write them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batches = {f"batch{n}": ["model=shapes", f"batch_size={n}", f"num_images={n}", *more] for n in BATCHES}
        (folder / "base").mkdir()
        base = ["model=local", f"model.path={undistilled(folder / 'base')}", *READ, "guidance=4", "steps=5", *more]
        guided = {
            f"guided{size}-{call}": [*base, f"height={size}", f"width={size}", f"guidance_batched={call == 'one'}"]
            for size in SIZES
            for call in ("two", "one")
        }
        drawn, steps = in_turns(batches, folder), in_turns(guided, folder)
    environment = drawn["batch1"][0].environment
    text = json.dumps(
        {
            "command": " ".join(["python scripts/throughput.py", out.name, *more]),
            "environment": environment,
            "load_average": os.getloadavg(),
            "throughput": [by_batch(n, drawn[f"batch{n}"]) for n in BATCHES],
            "guidance": [guidance(size, steps[f"guided{size}-two"], steps[f"guided{size}-one"]) for size in SIZES],
        },
        indent=1,
    )
    out.write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
