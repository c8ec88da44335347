"""Guidance in one call of the transformer a step: the same picture up to rounding, and counted."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import draw
from PIL import Image

from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.planning.prepare import prepare

BASE = ("model.distilled=false", "guidance=4", "negative_prompt=blurry")


@pytest.fixture(scope="module")
def bench():
    with SessionPool() as pool:
        yield pool


def latents(*overrides):
    """The last step's latents of a tiny run."""
    import torch
    from helpers import small

    from fluxrun.process.clock import DeviceClock
    from fluxrun.runner import assembled

    session = assembled(prepare(small(*BASE, *overrides)))
    try:
        clock = DeviceClock("cpu")
        embeds = session.prompts.of(["a", "b"], session.pipeline, clock)
        negative = session.prompts.of(["", "blurry"], session.pipeline, clock)
        if session.guidance is not None:
            session.guidance.begin(negative)
        drawn = session.pipeline(
            prompt_embeds=embeds, negative_prompt_embeds=negative, height=64, width=64, num_inference_steps=2,
            guidance_scale=4.0, generator=torch.Generator().manual_seed(0), output_type="latent",
        )  # fmt: skip
        return drawn.images, 0 if session.guidance is None else session.guidance.calls
    finally:
        session.close()


def test_both_halves_in_one_call_are_equal_up_to_rounding():
    (two, none), (one, calls) = latents(), latents("guidance_batched=true")
    assert (none, calls) == (0, 2)
    assert (two - one).abs().max() <= 1e-5 * two.abs().max()


@pytest.mark.parametrize("more", [(), ("memory=staged",), ("num_images=2", "batch_size=2")], ids=str)
def test_a_run(tmp_path, bench, more):
    pixels = []
    for batched in (False, True):
        how = (*BASE, *more, f"guidance_batched={str(batched).lower()}")
        record = draw(tmp_path / str(batched), *how, pool=bench)
        assert record.options["model"].facts.get("guidance_batched_calls") == (2 if batched else None)
        pixels.append(np.asarray(Image.open(tmp_path / str(batched) / record.images[-1].path), dtype=int))
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_a_later_run_over_the_same_pipeline_counts_anew(tmp_path, bench):
    how = (*BASE, "guidance_batched=true")
    records = [draw(tmp_path / seed, *how, f"seed={seed}", pool=bench) for seed in ("0", "1")]
    assert [record.options["model"].facts["guidance_batched_calls"] for record in records] == [2, 2]
