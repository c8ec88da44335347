"""Noise drawn ahead: diffusers' bits, whoever draws them and when."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.configuration_utils import FrozenDict
from helpers import draw, hashes

from fluxrun.drawing import noise
from fluxrun.drawing.noise import NoiseAhead, Wanted
from fluxrun.process import spans


def pipeline_like(kind=Flux2KleinPipeline, channels=128):
    """What shapes the noise, and diffusers' own way to draw it."""
    parts = {"vae_scale_factor": 8, "transformer": SimpleNamespace(config=FrozenDict(in_channels=channels))}
    methods = {"_pack_latents": kind._pack_latents, "_prepare_latent_ids": kind._prepare_latent_ids}
    return SimpleNamespace(**parts, **methods)


@pytest.mark.parametrize("kind", [Flux2KleinPipeline, Flux2Pipeline])
@pytest.mark.parametrize("seeds", [[7], [3, 4, 5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(64, 64), (72, 176)])
def test_the_bits_that_diffusers_would_draw(kind, seeds, dtype, size):
    pipeline = pipeline_like(kind)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def prepared(**how):
        return kind.prepare_latents(pipeline, len(seeds), 32, *size, dtype, torch.device("cpu"), **how)[0]

    expected = prepared(generator=generators[0] if len(seeds) == 1 else generators)
    wanted = Wanted.of(pipeline, seeds, size, dtype)
    with NoiseAhead() as ahead:
        found = prepared(generator=wanted.generators(), latents=ahead.of(wanted))
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_it_is_drawn_on_another_thread_once_and_kept_for_repeats(monkeypatch):
    drawn: list[tuple[tuple[int, ...], str]] = []
    own = Wanted.draw

    def counted(self):
        drawn.append((self.seeds, threading.current_thread().name))
        return own(self)

    monkeypatch.setattr(Wanted, "draw", counted)
    first, second, third = (Wanted((seed,), (4, 2, 2), torch.float32) for seed in range(3))
    with NoiseAhead() as ahead:
        ahead.begin(first)
        noise_of_first = ahead.of(first)
        ahead.begin(second)
        assert ahead.of(first) is noise_of_first
        assert not torch.equal(ahead.of(second), noise_of_first)
        ahead.begin(third)
        ahead.of(third)
        ahead.of(first)  # long gone: drawn again
    assert [seeds for seeds, _ in drawn] == [(0,), (1,), (2,), (0,)]
    assert all(thread.startswith("fluxrun-noise") for _, thread in drawn)


def test_what_could_not_be_drawn_is_tried_again(monkeypatch):
    failures = iter([MemoryError("no room")])

    def failing(shape, **how):
        if error := next(failures, None):
            raise error
        return torch.zeros(shape)

    monkeypatch.setattr(noise, "randn_tensor", failing)
    wanted = Wanted((0,), (4, 2, 2), torch.float32)
    with NoiseAhead() as ahead:
        with pytest.raises(MemoryError):
            ahead.of(wanted)
        assert ahead.of(wanted).shape == (1, 4, 2, 2)


def test_a_run_draws_each_noise_once_and_says_when(tmp_path):
    spans.forget()
    record = draw(tmp_path / "run", "num_images=3", "batch_size=2", "measure.repeats=2", "measure.warmup=1")
    assert [span.name for span in record.spans].count("noise") == 2
    assert hashes(record)[2:] == hashes(draw(tmp_path / "alone", "seed=2"))
