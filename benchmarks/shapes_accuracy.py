"""Held-out accuracy of the bundled model with plain diffusers: prompts -> images -> pixel checker -> JSON.

python benchmarks/shapes_accuracy.py                       # 360 prompts, 3 seeds: minutes on a CPU
python benchmarks/shapes_accuracy.py --per-set 5 --seeds 0 # a quick look
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from PIL.Image import Image

import bench
from fluxrun.shapes import evaluate

SIZE = {"height": 256, "width": 256}
CALL: Any = {"text_encoder_out_layers": (2, 4, 6), "max_sequence_length": 64, "guidance_scale": 1.0, **SIZE}
DEVICE, BATCH = "cuda" if torch.cuda.is_available() else "cpu", 8


def main() -> None:
    """Draw, judge, and write a report for each number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(bench.ROOT / "models" / "shapes"))
    parser.add_argument("--per-set", type=int, default=120, help="held-out prompts in each of the three sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[8])
    parser.add_argument("--output", type=Path, default=bench.ROOT / "benchmarks" / "results" / "shapes_accuracy.json")
    given = parser.parse_args()
    pipeline = Flux2KleinPipeline.from_pretrained(given.model, torch_dtype=torch.float32).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    cases = [case for name in evaluate.SETS for case in evaluate.prompts(name, given.per_set)]
    asked, seeds = cases * len(given.seeds), [seed for seed in given.seeds for _ in cases]
    reports: list[dict[str, Any]] = []
    for steps in given.steps:
        began = time.monotonic()
        images = [image for seed in given.seeds for image in draw(pipeline, cases, seed, steps)]
        about = {"steps": steps, "seeds": given.seeds, "device": DEVICE, "dtype": "float32"}
        about["seconds"] = round(time.monotonic() - began, 1)
        reports.append(about | evaluate.judge(asked, images, seeds, workers=os.cpu_count() or 1))
        print(json.dumps(about | reports[-1]["accuracy"] | reports[-1]["pair_all_by_relation"]), flush=True)
        given.output.write_text(json.dumps(reports, indent=1) + "\n")


def draw(pipeline: Any, cases: list[evaluate.Case], seed: int, steps: int) -> list[Image]:
    """One image for each prompt, each from its own generator with this seed."""
    images: list[Image] = []
    for start in range(0, len(cases), BATCH):
        prompts = [case.prompt for case in cases[start : start + BATCH]]
        generators = [torch.Generator("cpu").manual_seed(seed) for _ in prompts]
        images += pipeline(prompt=prompts, generator=generators, num_inference_steps=steps, **CALL).images
    return images


if __name__ == "__main__":
    main()
