"""Page-locked memory: weights on the CPU from which the GPU copies at full speed."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from fluxrun.offload import block_sizes
from fluxrun.offload.components import slots
from fluxrun.offload.tensors import plain_tensors
from fluxrun.types import Pipeline


class Pins:
    """Storages page-locked in place, for as long as this object lives; it belongs to the weights.

    torch's own ``pin_memory`` copies, and rounds every tensor up to a power of two: dev's weights would take 140 GB
    more. Memory must not be freed while it is registered, so the storages are held until they are not.
    """

    def __init__(self) -> None:
        self.refused_bytes = 0
        self._held: dict[int, torch.UntypedStorage] = {}
        weakref.finalize(self, unregister, self._held)

    @property
    def bytes(self) -> int:
        """Bytes that are page-locked."""
        return sum(storage.nbytes() for storage in self._held.values())

    def add(self, pipeline: Pipeline) -> dict[str, int]:
        """Page-lock the weights of text encoder and transformer; facts: bytes, and those that would not."""
        self.refused_bytes = 0
        for storage in _large_storages(pipeline):
            if storage.data_ptr() in self._held:
                continue
            if register(storage):
                self._held[storage.data_ptr()] = storage
            else:
                self.refused_bytes += storage.nbytes()
        return {"pinned_bytes": self.bytes, **({"not_pinned_bytes": self.refused_bytes} if self.refused_bytes else {})}


def _large_storages(pipeline: Pipeline) -> list[torch.UntypedStorage]:
    """The large storages of text encoder and transformer that lie on the CPU, each once."""
    modules = [m for m in (pipeline.text_encoder, pipeline.transformer) if isinstance(m, nn.Module)]
    tensors = (plain for m in modules for slot in slots(m) for plain in plain_tensors(slot.tensor))
    found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.device.type == "cpu"}
    return [storage for storage in found.values() if storage.nbytes() >= block_sizes.LARGE_BYTES]


def register(storage: torch.UntypedStorage) -> bool:
    """Page-lock a storage; returns whether the driver would."""
    runtime = torch.cuda.cudart()
    return int(runtime.cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0)) == 0


def unregister(held: dict[int, torch.UntypedStorage]) -> None:
    if held:
        torch.cuda.synchronize()  # nothing may be under way from memory that is let go
        runtime = torch.cuda.cudart()
        for address in held:
            runtime.cudaHostUnregister(address)
        held.clear()
