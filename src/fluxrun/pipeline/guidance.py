"""Classifier-free guidance in one call of the transformer a step: prompt and negative prompt as one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fluxrun.types import Pipeline


class BatchedGuidance:
    """Stands in for the transformer's call: a step's first call computes both halves, its second hands out the other.

    diffusers calls it twice a step, with the prompt's embeddings and then with the negative prompt's, all else equal.
    It stands outside of compiled and recorded forwards, which see one batch of twice the size.
    """

    def __init__(self, call: Callable[..., tuple[torch.Tensor]]) -> None:
        self.calls = 0
        """How many calls had both halves."""
        self._call = call
        self._negative: torch.Tensor | None = None
        self._other: torch.Tensor | None = None

    def begin(self, negative: torch.Tensor | None) -> None:
        """Begin a pipeline call with these negative embeddings; None: without guidance, each call stays as it is."""
        self._negative, self._other = negative, None

    def __call__(
        self, *, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **others: Any
    ) -> tuple[torch.Tensor]:
        if self._other is not None:
            other, self._other = self._other, None
            return (other,)
        if self._negative is None:
            return self._call(
                hidden_states=hidden_states, timestep=timestep, encoder_hidden_states=encoder_hidden_states, **others
            )
        # Position ids stay as they are: the transformer takes those of one picture for all.
        (both,) = self._call(
            hidden_states=torch.cat([hidden_states, hidden_states]),
            timestep=torch.cat([timestep, timestep]),
            encoder_hidden_states=torch.cat([encoder_hidden_states, self._negative.to(encoder_hidden_states.dtype)]),
            **others,
        )
        self.calls += 1
        mine, self._other = both.chunk(2)
        return (mine,)


def batch_guidance(pipeline: Pipeline) -> BatchedGuidance:
    """Let the pipeline's transformer compute both halves at once; after everything else was done to it."""
    transformer = pipeline.transformer
    batched = BatchedGuidance(transformer._compiled_call_impl or transformer._call_impl)
    transformer._compiled_call_impl = batched  # what ``transformer(…)`` calls
    return batched
