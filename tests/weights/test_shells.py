"""A shell's position ids: diffusers' values, made once for a size."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein_inpaint import Flux2KleinInpaintPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein_kv import Flux2KleinKVPipeline

from fluxrun.weights.shells import SIZES_KEPT, keep_positions

KINDS = [Flux2KleinPipeline, Flux2Pipeline, Flux2KleinInpaintPipeline, Flux2KleinKVPipeline]


class Pipeline:
    """What makes ids of a pipeline's class."""

    def __init__(self, kind):
        self._prepare_text_ids, self._prepare_latent_ids = kind._prepare_text_ids, kind._prepare_latent_ids


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_of_diffusers_whatever_size_came_before(kind):
    kept = Pipeline(kind)
    keep_positions(kept)
    for batch, tokens, height, width in [(1, 7, 4, 6), (2, 7, 4, 6), (1, 5, 6, 4), (1, 7, 4, 6)]:
        text, latents = torch.zeros(batch, tokens, 3), torch.zeros(batch, 5, height, width)
        for found, expected in (
            (kept._prepare_text_ids(text), kind._prepare_text_ids(text)),
            (kept._prepare_latent_ids(latents), kind._prepare_latent_ids(latents)),
        ):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


def test_a_size_is_made_once_and_few_are_kept():
    kept = Pipeline(Flux2KleinPipeline)
    keep_positions(kept)
    first = kept._prepare_text_ids(torch.zeros(1, 7, 3))
    assert kept._prepare_text_ids(torch.ones(1, 7, 9)) is first
    for tokens in range(1, SIZES_KEPT + 2):
        kept._prepare_text_ids(torch.zeros(1, 100 + tokens, 3))
    assert kept._prepare_text_ids(torch.zeros(1, 7, 3)) is not first


def test_text_at_another_time_is_made_as_diffusers_makes_it():
    kept = Pipeline(Flux2Pipeline)
    keep_positions(kept)
    text, times = torch.zeros(2, 3, 4), torch.tensor([[1], [5]])
    expected = Flux2Pipeline._prepare_text_ids(text, times)
    assert torch.equal(kept._prepare_text_ids(text, times), expected)
