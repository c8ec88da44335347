"""LoRA files for the tiny model: any layers, any rank, in any dialect."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

WIDTH = 64
TINY = {
    "time_guidance_embed.timestep_embedder.linear_1": (32, WIDTH),
    "double_stream_modulation_img.linear": (WIDTH, 6 * WIDTH),
    "x_embedder": (16, WIDTH),
    **{f"transformer_blocks.0.attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"transformer_blocks.0.attn.add_{name}_proj": (WIDTH, WIDTH) for name in "qkv"},
    "transformer_blocks.0.attn.to_add_out": (WIDTH, WIDTH),
    "transformer_blocks.0.ff.linear_in": (WIDTH, 6 * WIDTH),
    "transformer_blocks.0.ff.linear_out": (3 * WIDTH, WIDTH),
    **{f"single_transformer_blocks.{n}.attn.to_qkv_mlp_proj": (WIDTH, 9 * WIDTH) for n in (0, 1)},
    **{f"single_transformer_blocks.{n}.attn.to_out": (4 * WIDTH, WIDTH) for n in (0, 1)},
    "norm_out.linear": (WIDTH, 2 * WIDTH),
    "proj_out": (WIDTH, 16),
}
"""Linear layers of the tiny transformer, with their inputs and outputs."""

QKV = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"]

BLOCKS = [name for name in TINY if "blocks" in name]


def write_lora(
    file: Path,
    layers: Iterable[str] = BLOCKS,
    rank: int = 4,
    *,
    seed: int = 0,
    prefix: str = "transformer.",
    words: tuple[str, str] = ("lora_A", "lora_B"),
    alpha: float | None = None,
    strength: float = 0.3,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a LoRA of random matrices and return ``file``; ``alpha`` stands beside each pair."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        inputs, outputs = TINY.get(layer, (WIDTH, WIDTH))
        tensors[f"{prefix}{layer}.{words[0]}.weight"] = strength * torch.randn(rank, inputs, generator=random)
        tensors[f"{prefix}{layer}.{words[1]}.weight"] = strength * torch.randn(outputs, rank, generator=random)
        if alpha is not None:
            tensors[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file, metadata)
    return file
