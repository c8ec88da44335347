"""diffusers' group offload for transformer and text encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# --- group offload --------------------------------------------------------------------------------


def stream_in(pipeline: Any, device: str, blocks: int | None, use_stream: bool) -> int:
    """diffusers' group offload for transformer and text encoder; returns how many groups it made.

    ``blocks`` transformer blocks move together, None: layer by layer, as always in the text encoder, whose blocks
    diffusers does not find. The VAE, a hundredth of dev's weights, stays on the device.
    """
    from diffusers.hooks import apply_group_offloading

    for name in ("text_encoder", "transformer"):
        module = getattr(pipeline, name)
        if isinstance(module, nn.Module):
            by_block = blocks is not None and name == "transformer"
            apply_group_offloading(
                module, torch.device(device), torch.device("cpu"),
                offload_type="block_level" if by_block else "leaf_level",
                num_blocks_per_group=blocks if by_block else None, use_stream=use_stream,
            )  # fmt: skip
    pipeline.vae.to(device)
    return _groups(pipeline)


def _groups(pipeline: Any) -> int:
    """Modules whose group-offloading hook diffusers really registered."""
    modules = (s for m in pipeline.components.values() if isinstance(m, nn.Module) for s in m.modules())
    return sum(
        registry.get_hook("group_offloading") is not None
        for module in modules
        if (registry := getattr(module, "_diffusers_hook", None)) is not None
    )
