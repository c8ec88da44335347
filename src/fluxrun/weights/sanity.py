"""Whether a checkpoint's configs ask for sizes that its weights do not have: looked at before anything is built.

A config of a few lines can ask for a million layers. A library builds them all, even on the meta device, before it
finds that the weights are of another model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluxrun.errors import ConfigError
from fluxrun.formatting import shorten
from fluxrun.types import JsonObject
from fluxrun.weights.headers import Tensor, is_special

LAYERS = ("num_layers", "num_single_layers", "num_hidden_layers")
"""Counts of layers: each has at least one tensor."""

WIDTHS = (
    "attention_head_dim", "axes_dims_rope", "block_out_channels", "decoder_block_out_channels", "head_dim",
    "hidden_size", "image_size", "in_channels", "intermediate_size", "joint_attention_dim", "latent_channels",
    "norm_num_groups", "num_attention_heads", "num_channels", "num_key_value_heads", "out_channels", "patch_size",
    "timestep_guidance_channels", "vocab_size",
)  # fmt: skip
"""Sizes of tensors: none is larger than all of them together."""

MOST_ENTRIES = 1000
"""Longest list in a config."""

MOST_TRAIN_TIMESTEPS = 1_000_000


def check_config(file: Path, config: JsonObject, tensors: dict[str, Tensor]) -> None:
    """Refuse a component's config that asks for more than its weights hold. Raises ConfigError."""
    elements = sum(max(1, *tensor.shape) if tensor.shape else 1 for tensor in tensors.values())
    for key, value in _entries(config):
        if isinstance(value, list) and len(value) > MOST_ENTRIES:
            raise ConfigError(f"{file}: {shorten(key)} has {len(value):,} entries, at most {MOST_ENTRIES:,} are read")
        if key in LAYERS and isinstance(value, list):
            raise ConfigError(f"{file}: {key}={shorten(value)} cannot be: it is one number")
        if key in (*LAYERS, "layers_per_block"):
            _check_numbers(file, key, value, len(tensors), f"its weights have {len(tensors):,} tensors")
        elif key in WIDTHS:
            _check_numbers(file, key, value, elements, "its weights are smaller")


def check_scheduler(file: Path, config: JsonObject) -> None:
    """Refuse a scheduler whose table of timesteps would fill the memory. Raises ConfigError."""
    steps = config.get("num_train_timesteps", 1)
    _check_numbers(file, "num_train_timesteps", steps, MOST_TRAIN_TIMESTEPS, f"at most {MOST_TRAIN_TIMESTEPS:,}")


def check_files(folder: Path) -> None:
    """Refuse pipes and devices among a checkpoint's files: a library would wait for them. Raises ConfigError."""
    for place in (folder, *(entry for entry in sorted(folder.iterdir()) if os.path.isdir(entry))):
        if special := next((file for file in sorted(place.iterdir()) if is_special(file)), None):
            raise ConfigError(f"{special} is no plain file but a pipe or a device")


def _check_numbers(file: Path, key: str, value: Any, most: int, why: str) -> None:
    for number in value if isinstance(value, list) else [value]:
        if number is not None and (isinstance(number, (bool, str, dict)) or not _within(number, most)):
            raise ConfigError(f"{file}: {key}={shorten(value)} cannot be: {why}")


def _within(number: Any, most: int) -> bool:
    return isinstance(number, (int, float)) and 0 <= number <= most


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values at every depth: a text encoder's sizes lie in a config of their own."""
    waiting = [config]
    while waiting:
        node = waiting.pop()
        for key, value in node.items() if isinstance(node, dict) else ():
            yield key, value
            waiting.append(value)
