"""diffusers' group offload for transformer and text encoder."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from fluxrun.offload.components import keep_vae_on
from fluxrun.types import Pipeline


def group_offload(
    pipeline: Pipeline, device: str, counters: Counter[str], *, blocks: int | None, use_stream: bool
) -> int:
    """diffusers' group offload for transformer and text encoder; returns how many groups it made.

    ``blocks`` transformer blocks move together, None: layer by layer, as always in the text encoder, whose blocks
    diffusers does not find. The VAE stays on the device.
    """
    from diffusers.hooks.group_offloading import apply_group_offloading

    components = {"text_encoder": pipeline.text_encoder, "transformer": pipeline.transformer}
    for name, module in components.items():
        if isinstance(module, nn.Module):
            by_block = blocks is not None and name == "transformer"
            apply_group_offloading(
                module, torch.device(device), torch.device("cpu"),
                offload_type="block_level" if by_block else "leaf_level",
                num_blocks_per_group=blocks if by_block else None, use_stream=use_stream,
            )  # fmt: skip
    keep_vae_on(pipeline, device, counters)
    return _groups(pipeline)


def _groups(pipeline: Pipeline) -> int:
    """Modules whose group-offloading hook diffusers really registered."""
    modules = (s for m in pipeline.components.values() if isinstance(m, nn.Module) for s in m.modules())
    return sum(
        registry.get_hook("group_offloading") is not None
        for module in modules
        if (registry := getattr(module, "_diffusers_hook", None)) is not None
    )
