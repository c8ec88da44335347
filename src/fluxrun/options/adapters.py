"""LoRA files as matrices by layer, and all of a run's files together as one adapter that can be swapped in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

Sizes = tuple[int, int]
"""A layer's inputs and outputs."""


class Matrices(NamedTuple):
    """What a file adds to one layer: ``factor * up @ down``."""

    down: torch.Tensor
    """[rank, inputs]"""
    up: torch.Tensor
    """[outputs, rank]"""
    factor: float
    """The file's alpha by its rank."""


@dataclass(frozen=True)
class Adapter:
    """One LoRA file, read for one transformer."""

    name: str
    sha256: str
    scale: float
    layers: Mapping[str, Matrices]
    """By the transformer's own names of its layers."""
    dropped: Sequence[str] = ()
    """What of the file is not drawn, in words."""

    @property
    def ranks(self) -> dict[str, int]:
        """The rank in each layer."""
        return {layer: len(matrices.down) for layer, matrices in self.layers.items()}


@dataclass(frozen=True)
class Room:
    """The layers that adapters may touch, and the rank that each of them has: zeros where a file needs less."""

    layers: Mapping[str, Sizes]
    rank: int

    def holds(self, other: Room) -> bool:
        """Whether an adapter that needs ``other`` can be swapped in here."""
        return other.rank <= self.rank and other.layers.keys() <= self.layers.keys()


def room_for(ranks: Iterable[Sequence[Mapping[str, int]]], sizes: Mapping[str, Sizes]) -> Room:
    """The room that each of several runs fits; of a run, the ranks by layer of each of its files, which add up."""
    total = [
        {layer: sum(file.get(layer, 0) for file in files) for layer in set().union(*files)} for files in ranks if files
    ]
    layers = set().union(*total)
    # In the model's order; one rank for all: diffusers' LoraConfig scales layers whose ranks differ from each other.
    return Room(
        {layer: size for layer, size in sizes.items() if layer in layers}, max(max(run.values()) for run in total)
    )


@dataclass(frozen=True)
class LoraWeights:
    """A run's adapters, and the room that this run and later ones over the same pipeline need."""

    adapters: Sequence[Adapter]
    room: Room
    counts: dict[str, int] = field(default_factory=dict)

    def state_dict(self, scale: float, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """All adapters as one, in diffusers' names: their matrices side by side, every scale in ``lora_B``.

        What peft multiplies by is then 1 for every file and scale, so that nothing about compiled code changes.
        """
        import torch

        tensors = {}
        for layer, (inputs, outputs) in self.room.layers.items():
            down = torch.zeros(self.room.rank, inputs, dtype=dtype, device=device)
            up = torch.zeros(outputs, self.room.rank, dtype=dtype, device=device)
            start = 0
            for adapter in self.adapters:
                if layer in adapter.layers:
                    one = adapter.layers[layer]
                    end = start + len(one.down)
                    down[start:end] = one.down
                    up[:, start:end] = one.up.float() * (one.factor * adapter.scale * scale)
                    start = end
            tensors[f"transformer.{layer}.lora_A.weight"] = down
            tensors[f"transformer.{layer}.lora_B.weight"] = up
        return tensors
