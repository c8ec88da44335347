"""Whole pictures: prompt to PIL image, prompts to PNG files, all of dev's 50 steps."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.results import Row
from bench.settings import FAST, PLAIN, PRESETS, REFERENCE, Setting
from bench.timed import KLEIN_GB, TEXT_ENCODER_GB, Timed
from bench.worker import Job

PROMPTS = tuple(f"a lighthouse at dusk, {what}" for what in ("oil", "ink", "pastel", "gouache", "fresco", "etching"))
STAGES = {"text_s": "text encoder", "denoise_s": "4 steps", "decode_s": "decode to PIL", "total_s": "all in one go"}


def images(job: Job) -> Iterator[Row]:
    """Prompt to PIL image, text encoder included: in one go, and once more with a clock between the stages."""
    import numpy as np
    import torch

    from bench.subject import PROMPT, Subject, free_memory, text_arguments

    def draw() -> Any:
        """Plain diffusers gets the prompt; fluxrun encodes it first, as its own runs do."""
        if subject.session is None:
            return subject.image(prompt=PROMPT, **text_arguments(subject.plan))
        return subject.image(prompt_embeds=subject.encode())

    def stages() -> dict[str, list[float]]:
        text_s, embeddings = subject.timed(subject.encode)
        drawn = subject.draw(prompt_embeds=embeddings)
        return {"text_s": [text_s], "denoise_s": [drawn.denoise_s], "decode_s": [drawn.decode_s]}

    subject = Subject(job, text_encoder=True)
    yield {"build_peak_gb": subject.peak_gb()}
    first_s, _ = subject.timed(lambda: subject.first(draw))
    pixels = torch.from_numpy(np.asarray(subject.first(draw), dtype=np.float32))  # graphs are recorded at this call
    stages()
    free_memory()
    yield {"first_call_s": first_s, **subject.error(pixels)}
    while True:
        draw()
        yield {"samples": {"total_s": [subject.timed(draw)[0]], **stages()}, **subject.facts()}


IMAGE = Timed(
    name="image", about="klein-4B, prompt to PIL image, text encoder included", seconds=100,
    key="total_s", metric="prompt to PIL image, 4 steps", task=images, overrides=("steps=4",),
    gigabytes=KLEIN_GB + TEXT_ENCODER_GB, groups=(PRESETS,), stages=STAGES,
)  # fmt: skip


def files(job: Job) -> Iterator[Row]:
    """Prompts to PNG files, one by one: text encoder, drawing and saving, as a user waits for them.

    Plain diffusers is given a prompt and saves the picture as PIL does by itself. fluxrun does all of it in one run,
    and builds at the first one; what was in effect is in the run's record.
    """
    from bench.subject import Subject, compose, text_arguments
    from fluxrun.pipeline.session_pool import SessionPool
    from fluxrun.runner import run

    subject, pool = Subject(job, text_encoder=True) if job.setting.recipe else None, SessionPool()

    def draw(folder: Path) -> Row:
        if subject is not None:
            for number, prompt in enumerate(PROMPTS):
                subject.image(prompt=prompt, **text_arguments(subject.plan)).save(folder / f"{number}.png")
            return {}
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
        # resident, whatever memory the settings measured beside this one leave free.
        given = [*job.overrides, *job.setting.overrides.split(), "memory=resident", f"prompts_file={prompts}"]
        return run(compose(given), folder / "run", pool=pool).model_dump(mode="json", include={"options"})

    def seconds() -> tuple[float, Row]:
        with tempfile.TemporaryDirectory(prefix="fluxrun-speed-") as folder:
            started = time.perf_counter()
            facts = draw(Path(folder))
            return time.perf_counter() - started, facts

    yield {}
    (first_s, _), _ = seconds(), seconds()
    yield {"first_call_s": first_s}
    while True:
        file_s, facts = seconds()
        yield {"samples": {"file_s": [file_s / len(PROMPTS)]}, **facts}


FILES = Timed(
    name="files", about="klein-4B, prompts to PNG files: everything a user waits for", seconds=90,
    key="file_s", metric="prompt to PNG file, one of six", task=files, overrides=("steps=4",),
    gigabytes=KLEIN_GB + TEXT_ENCODER_GB, rounds=3, groups=(PRESETS,),
)  # fmt: skip


def all_steps(job: Job) -> Iterator[Row]:
    """Embeddings to PIL image over all of a model's steps; the first image is drawn whole, a cache needs it."""
    from bench.subject import Subject

    subject = Subject(job)
    yield {"build_peak_gb": subject.peak_gb()}
    # Plain diffusers has nothing to warm up but its kernels, and its images take half a minute.
    fewer = {"num_inference_steps": 2} if job.setting.name == REFERENCE else {}
    yield {"first_call_s": subject.timed(lambda: subject.first(lambda: subject.draw(**fewer)))[0]}
    while True:
        total_s, drawn = subject.timed(subject.draw)
        samples = {
            "total_s": [total_s],
            "step_ms": [seconds * 1e3 for seconds in drawn.step_s],
            "decode_s": [drawn.decode_s],
        }
        yield {"samples": samples, **subject.facts()}


CACHED = Setting("h100_fast_fixed_cache", f"{FAST.overrides} cache=fixed cache.compute=0.5")

LONG = Timed(
    name="long", about="dev, embeddings to PIL image, all 50 steps: half of them computed, beside plain diffusers",
    label="dev", model="dev", seconds=120, key="total_s", metric="embeddings to PIL image, 50 steps", task=all_steps,
    overrides=("steps=50",), gigabytes=None, rounds=2, passes=1,
    groups=((CACHED, PLAIN),),
)  # fmt: skip
