"""Plain diffusers with its own model offloading under a memory limit: ``speed_offloaded.py GB override … DIR``.

What a user without fluxrun does with a model that does not fit: ``enable_model_cpu_offload``, the prompt given to the
pipeline each time. Leaves the parts of a run.json that ``speed_commands`` reads.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from speed_capped import limit_memory
from speed_plain import plain_pipeline
from speed_subject import PROMPT, SEED

import fluxrun

SHORT_S = 30.0
"""An image that takes less is drawn once more: what the first one pays for kernels and memory counts then."""


def main() -> None:
    """Load to the computer's memory, draw, and write what it took."""
    _, limit, *overrides, folder = sys.argv
    config: Any = fluxrun.compose(overrides)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limit_memory(float(limit))
    imported_s = time.time() - psutil.Process().create_time()
    started = time.perf_counter()
    pipeline = plain_pipeline(config.model, "cpu", text_encoder=True, dtype="bfloat16" if device == "cuda" else None)
    if device == "cuda":
        pipeline.enable_model_cpu_offload()
        torch.cuda.reset_peak_memory_stats()
    loaded = time.perf_counter()
    images = [_image_s(pipeline, config)]
    if images[0] < SHORT_S:
        images.append(_image_s(pipeline, config))
    drawn_s = time.perf_counter() - started
    timings = {"import_s": imported_s, "load_s": loaded - started, "total_s": imported_s + drawn_s}
    stages = {"text_encode_s": [], "denoise_s": images, "decode_s": [0.0] * len(images), "first_call_s": None}
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    record = {
        "status": "completed",
        "error": None,
        "options": {"memory": {"requested": "model offload", "effective": "diffusers' model offload"}},
        "notes": [],
        "timings": {**timings, **stages},
        "memory": {"peak_allocated_bytes": peak},
    }
    out = Path(folder.removeprefix("hydra.run.dir="))
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(record), encoding="utf-8")


def _image_s(pipeline: Any, config: Any) -> float:
    """Seconds from prompt to PIL image."""
    model = config.model
    layers = {"text_encoder_out_layers": model.text_encoder_out_layers} if model.text_encoder_out_layers else {}
    started = time.perf_counter()
    pipeline(
        prompt=PROMPT,
        height=config.height or model.height,
        width=config.width or model.width,
        num_inference_steps=config.steps or model.steps,
        generator=torch.Generator("cpu").manual_seed(SEED),
        max_sequence_length=model.max_sequence_length,
        **layers,
        **({"guidance_scale": 1.0} if model.distilled else {}),
    )
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
