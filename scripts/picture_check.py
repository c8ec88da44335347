"""What looking at every picture costs on this GPU, in milliseconds a picture.

    python scripts/picture_check.py OUT.json

Two figures: the look itself on tensors of a 1024x1024 picture (CUDA events), and whole pictures of klein-4B with and
without it in turns (random weights, one process, prompt to PIL image).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fluxrun
from fluxrun.drawing.inspection import Inspection, extremes


def kernels(repeats: int = 200) -> list[float]:
    """Milliseconds of each look on the device, its copy to the CPU included."""
    latents = torch.randn(1, 4096, 128, device="cuda", dtype=torch.bfloat16)
    pixels = torch.randn(1, 3, 1024, 1024, device="cuda", dtype=torch.bfloat16)
    found = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        extremes(latents, pixels).tolist()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return found[10:]


def pictures(repeats: int = 40) -> dict[str, list[float]]:
    """Milliseconds a picture, with the look and without, in turns."""
    config = fluxrun.compose(["+preset=h100_fast", "model=flux2_klein_4b", "model.weights=random"])
    pipeline = fluxrun.build(config).pipeline
    found: dict[str, list[float]] = {"without": [], "with": []}
    for number in range(repeats * 2 + 6):
        which = "with" if number % 2 else "without"
        torch.cuda.synchronize()
        started = time.perf_counter()
        call = {"prompt": "a cat", "num_inference_steps": 4, "height": 1024, "width": 1024}
        if which == "with":
            drawn_and_looked_at(pipeline, call)
        else:
            pipeline(**call, callback_on_step_end=lambda p, i, t, v: {})
        if number >= 6:
            found[which].append((time.perf_counter() - started) * 1e3)
    return found


def drawn_and_looked_at(pipeline: Any, call: dict[str, Any]) -> None:
    """A picture as a run draws it, as far as the look goes."""
    inspection = Inspection()

    def step(_pipeline: Any, _number: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        inspection.step(values)
        return {}

    with inspection.of(pipeline):
        images = pipeline(**call, callback_on_step_end=step).images
    inspection.findings(images, [])


def main(out: Path) -> None:
    """Measure, print the medians, write every sample."""
    look, whole = kernels(), pictures()
    medians = {"look_ms": statistics.median(look), **{f"{k}_ms": statistics.median(v) for k, v in whole.items()}}
    content = {"gpu": torch.cuda.get_device_name(), "medians": medians, "look": look, "pictures": whole}
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(medians))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
