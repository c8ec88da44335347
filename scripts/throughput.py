"""Latency and throughput by batch size, and guidance in one call a step against two.

    python scripts/throughput.py OUT.json shapes [key=value …]      # the bundled model, on any machine
    python scripts/throughput.py OUT.json klein_4b [key=value …]    # real size, random weights: a GPU

Every setting is drawn in turns (forwards, then backwards), so that a busy machine is busy for all of them; each figure
is the median over all turns, with the fastest beside it. Guidance of `shapes` is measured with the same weights under
an index that says they are not distilled: the speed of a klein base model of that size, no picture.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

import fluxrun
from fluxrun.options.model import BUNDLED
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.process.clock import DeviceClock
from fluxrun.record.schema import RunRecord

BATCHES = (1, 2, 4, 8)
SIZES = {"shapes": (64, 128, 256), "klein_4b": (256, 512, 1024)}
TURNS = 3
PROMPT = "a red circle left of a blue square"
READ = ("model.text_encoder_out_layers=[2,4,6]", "model.max_sequence_length=64", "model.dtype=auto")


def undistilled(folder: Path) -> Path:
    """The bundled weights, under an index that says that they are not distilled."""
    folder.mkdir()
    shapes = next(root / "shapes" for root in BUNDLED if (root / "shapes").is_dir())
    for part in shapes.iterdir():
        if part.name != "model_index.json":
            (folder / part.name).symlink_to(part)
    index = json.loads((shapes / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": False}))
    return folder


def models(name: str, folder: Path) -> tuple[list[str], list[str]]:
    """The overrides of a distilled model and of a base model of its size."""
    if name == "klein_4b":
        return ["model=flux2_klein_4b", "model.weights=random"], ["model=flux2_klein_base_4b", "model.weights=random"]
    return ["model=shapes"], ["model=local", f"model.path={undistilled(folder / 'base')}", *READ]


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
    }


def last_latents(overrides: Sequence[str]) -> torch.Tensor:
    """What a guided run's pipeline hands to the VAE."""
    with closing(fluxrun.build(fluxrun.compose(list(overrides)))) as session:
        clock = DeviceClock(session.plan.machine.device)
        embeds, negative = (session.prompts.of([text], session.pipeline, clock) for text in (PROMPT, ""))
        if session.guidance is not None:
            session.guidance.begin(negative)
        height, width = session.plan.size
        drawn = session.pipeline(
            prompt_embeds=embeds, negative_prompt_embeds=negative, height=height, width=width, guidance_scale=4.0,
            num_inference_steps=session.plan.steps, generator=torch.Generator("cpu").manual_seed(0),
            output_type="latent",
        )  # fmt: skip
        latents: torch.Tensor = drawn.images
        return latents


def apart(two: Sequence[str], one: Sequence[str]) -> dict[str, Any]:
    """How far the latents of one call a step are from those of two, by the largest latent."""
    ours, theirs = last_latents(one), last_latents(two)
    largest = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    return {"largest_difference": largest.item(), "dtype": str(theirs.dtype)}


def main(out: Path, name: str, more: Sequence[str]) -> None:
    """Measure both and write them."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        distilled, base = models(name, folder)
        batches = {f"batch{n}": [*distilled, f"batch_size={n}", f"num_images={n}", *more] for n in BATCHES}
        guided = {
            f"guided{size}-{call}": [
                *base, "guidance=4", "steps=5", f"height={size}", f"width={size}", f"guidance_batched={call == 'one'}",
                *more,
            ]
            for size in SIZES[name]
            for call in ("two", "one")
        }  # fmt: skip
        drawn, steps = in_turns(batches, folder), in_turns(guided, folder)
        far = {size: apart(guided[f"guided{size}-two"], guided[f"guided{size}-one"]) for size in SIZES[name]}
    text = json.dumps(
        {
            "command": " ".join(["python scripts/throughput.py", out.name, name, *more]),
            "environment": drawn["batch1"][0].environment,
            "load_average": os.getloadavg(),
            "throughput": [by_batch(n, drawn[f"batch{n}"]) for n in BATCHES],
            "guidance": [
                guidance(size, steps[f"guided{size}-two"], steps[f"guided{size}-one"]) | far[size]
                for size in SIZES[name]
            ],
        },
        indent=1,
    )
    out.write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
