"""Held-out accuracy of the bundled model with plain diffusers: prompts -> images -> pixel checker -> JSON and a sheet.

python benchmarks/shapes_accuracy.py                       # 360 prompts, 3 seeds: minutes on a CPU
python benchmarks/shapes_accuracy.py --per-set 5 --seeds 0 # a quick look
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from fluxrun.shapes import evaluate

CALL = {
    "text_encoder_out_layers": (2, 4, 6),
    "max_sequence_length": 64,
    "guidance_scale": 1.0,
    "height": 256,
    "width": 256,
}


def draw(pipeline: Flux2KleinPipeline, prompts: list[str], seed: int, steps: int, batch: int) -> list[Image.Image]:
    """One image for each prompt, each from its own generator with this seed."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator("cpu").manual_seed(seed) for _ in part]
        images += pipeline(prompt=part, generator=generators, num_inference_steps=steps, **CALL).images
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/shapes")
    parser.add_argument("--per-set", type=int, default=120, help="held-out prompts in each of the three sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[8])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/shapes_accuracy.json"))
    parser.add_argument("--sheet", type=Path, default=None, help="also write a contact sheet (PNG)")
    parser.add_argument("--dump", type=Path, default=None, help="also keep the first step count's images (npz)")
    options = parser.parse_args()
    pipeline = Flux2KleinPipeline.from_pretrained(options.model, torch_dtype=getattr(torch, options.dtype))
    pipeline.to(options.device).set_progress_bar_config(disable=True)
    cases = [case for name in evaluate.SETS for case in evaluate.prompts(name, options.per_set)]
    reports = []
    for steps in options.steps:
        began, images = time.monotonic(), []
        for seed in options.seeds:
            images += draw(pipeline, [case.prompt for case in cases], seed, steps, options.batch)
        seconds = time.monotonic() - began
        asked = cases * len(options.seeds)
        if options.dump and steps == options.steps[0]:
            np.savez_compressed(options.dump, images=np.stack([np.asarray(image) for image in images]))
        report = evaluate.judge(
            asked, images, [seed for seed in options.seeds for _ in cases], workers=os.cpu_count() or 1
        )
        header = {"steps": steps, "seeds": options.seeds, "device": options.device, "dtype": options.dtype}
        reports.append(header | {"seconds": round(seconds, 1)} | report)
        print(json.dumps(header | report["accuracy"] | report["pair_all_by_relation"]), flush=True)
        if options.sheet and steps == options.steps[0]:
            write_sheet(options.sheet, asked, images)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(reports, indent=1) + "\n")


def write_sheet(path: Path, cases: list[evaluate.Case], images: list[Image.Image], count: int = 24) -> None:
    """A random choice of the images, good and bad alike."""
    chosen = sorted(random.Random(0).sample(range(len(images)), min(count, len(images))))
    sheet = evaluate.contact_sheet([images[i] for i in chosen], [cases[i].prompt for i in chosen])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    main()
