"""Weights that live in the CPU's memory and visit the GPU: pinned where they lie, and never copied back.

diffusers' and accelerate's offloading moves a module away by copying it to the CPU: time for nothing, as inference
changes no weight, and a second set of weights beside the store's, which 64 GB of transformer do not leave room for.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fluxrun import swap_sizes
from fluxrun.tensors import plain_tensors, tensor_bytes

Slot = tuple[dict[str, Any], str, torch.Tensor]


class TakeTurns:
    """Text encoder and transformer on the GPU by turns, the VAE always.

    The pipeline says whose turn it is: ``encode_prompt`` is the text encoder's, ``prepare_latents`` begins the
    transformer's. No hook sits in a module's forward, so that torch.compile and step caches see what they expect.
    """

    def __init__(self, pipeline: Any, device: str, counters: Counter[str]) -> None:
        self.guests = {
            name: Guest(slots(module))
            for name in ("text_encoder", "transformer")
            if isinstance(module := getattr(pipeline, name), nn.Module)
        }
        self.device, self.counters = torch.device(device), counters
        self.inside: str | None = None
        pipeline.vae.to(device)  # the first module of the pipeline: diffusers takes its device for all inputs
        encode_prompt, prepare_latents = pipeline.encode_prompt, pipeline.prepare_latents

        def encode(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("prompt_embeds") is None:
                self.enter("text_encoder")
            return encode_prompt(*args, **kwargs)

        def prepare(*args: Any, **kwargs: Any) -> Any:
            self.enter("transformer")
            return prepare_latents(*args, **kwargs)

        pipeline.encode_prompt, pipeline.prepare_latents = encode, prepare

    def enter(self, name: str) -> None:
        """Copy one component to the GPU; the other one's copy is let go first."""
        if name == self.inside or name not in self.guests:
            return
        for other in self.guests.values():
            other.go_home()
        self.inside = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # a large component does not fit into the holes another one leaves
        self.counters["bytes_moved"] += self.guests[name].visit(self.device)
        self.counters["components_moved"] += 1
        self.inside = name


class Guest:
    """Weights that stay where they are: a visit gives their modules copies, going home the originals again."""

    def __init__(self, home: Iterable[Slot]) -> None:
        self.home = list(home)

    def visit(self, device: torch.device) -> int:
        """Copy every weight and buffer to ``device``, tied ones once; returns the bytes copied."""
        copies: dict[int, torch.Tensor] = {}
        for table, name, tensor in self.home:
            if id(tensor) not in copies:
                copies[id(tensor)] = copied(tensor, device)
            table[name] = copies[id(tensor)]
        return tensor_bytes(copies.values())

    def go_home(self) -> None:
        """Put the originals back; the copies are freed."""
        for table, name, tensor in self.home:
            table[name] = tensor


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on another device; a parameter stays one (torchao's tensors included)."""
    moved = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def slots(module: nn.Module) -> Iterator[Slot]:
    """Where each parameter and buffer of a module and those inside it is kept: table, name, tensor."""
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            yield from ((table, name, tensor) for name, tensor in table.items() if tensor is not None)


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


# --- pinning --------------------------------------------------------------------------------------


class Pins:
    """Storages page-locked where they lie, for as long as this object lives; it belongs to the weights.

    torch's own ``pin_memory`` copies, and rounds every tensor up to a power of two: dev's weights would take 140 GB
    more. Memory must not be freed while it is registered, so the storages are held until they are not.
    """

    def __init__(self) -> None:
        self.refused_bytes = 0
        self._held: dict[int, torch.UntypedStorage] = {}
        weakref.finalize(self, _unregister, self._held)

    @property
    def bytes(self) -> int:
        """Bytes that are page-locked."""
        return sum(storage.nbytes() for storage in self._held.values())

    def add(self, pipeline: Any) -> dict[str, Any]:
        """Page-lock the weights of text encoder and transformer; facts: bytes, and those that would not."""
        self.refused_bytes = 0
        for storage in _large_storages(pipeline):
            if storage.data_ptr() in self._held:
                continue
            if _register(storage):
                self._held[storage.data_ptr()] = storage
            else:
                self.refused_bytes += storage.nbytes()
        return {"pinned_bytes": self.bytes, **({"not_pinned_bytes": self.refused_bytes} if self.refused_bytes else {})}


def _large_storages(pipeline: Any) -> list[torch.UntypedStorage]:
    """The large storages of text encoder and transformer that lie on the CPU, each once."""
    modules = [m for m in (pipeline.text_encoder, pipeline.transformer) if isinstance(m, nn.Module)]
    tensors = (plain for m in modules for _, _, tensor in slots(m) for plain in plain_tensors(tensor))
    found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.device.type == "cpu"}
    return [storage for storage in found.values() if storage.nbytes() >= swap_sizes.LARGE_BYTES]


def _register(storage: torch.UntypedStorage) -> bool:
    runtime: Any = torch.cuda.cudart()
    return int(runtime.cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0)) == 0


def _unregister(held: dict[int, torch.UntypedStorage]) -> None:
    if held:
        torch.cuda.synchronize()  # nothing may be under way from memory that is let go
        runtime: Any = torch.cuda.cudart()
        for address in held:
            runtime.cudaHostUnregister(address)
        held.clear()
