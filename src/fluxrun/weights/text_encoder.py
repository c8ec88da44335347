"""What of a text encoder is worth loading: the layers up to the last one read, and no language-model head.

The prompt embedding is made of a few hidden states from the middle of a language model. The layers behind the last one
read, the final norm and the head (a matrix of tokens × vocabulary) would be loaded, stored and run for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fluxrun.architectures import layers_needed

C = TypeVar("C", bound=PreTrainedConfig)


@dataclass
class NeededLayers:
    """Cuts one text encoder: first its config, so that the rest is never built or loaded, then the module."""

    read: tuple[int, ...]
    """Indices of the hidden states that are read; n is the output of the n-th layer, 0 the token embedding."""
    total: int = 0
    kept: int = 0
    parameters_left_out: int = 0

    def cut(self, config: C) -> C:
        """Lower the number of layers in a transformers config, in place; returns the config."""
        text = config.get_text_config()
        self.total = text.num_hidden_layers
        self.kept = layers_needed(self.total, self.read)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: self.kept]
        text.num_hidden_layers = self.kept
        return config

    def trim(self, encoder: PreTrainedModel) -> None:
        """Take the head and, where layers were cut, the final norm out of ``encoder``.

        With the norm in place the last hidden state would come normed, which it is not in the whole model.
        """
        decoder = encoder.get_decoder()
        tied = encoder.lm_head.weight is decoder.embed_tokens.weight
        dropped = 0 if tied else _count(encoder.lm_head)
        encoder.lm_head = nn.Identity()
        # Nothing is left that could be tied to the embedding, and what moves a model ties it again.
        encoder.config.tie_word_embeddings = False
        if self.kept < self.total:
            dropped += (self.total - self.kept) * _count(decoder.layers[0]) + _count(decoder.norm)
            decoder.norm = nn.Identity()
        self.parameters_left_out = dropped

    def facts(self, itemsize: int) -> dict[str, Any]:
        """What was kept and what was left out, with parameters of ``itemsize`` bytes."""
        saved = self.parameters_left_out * itemsize
        return {"layers": self.kept, "layers_of": self.total, "head": "left out", "bytes_saved": saved}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
