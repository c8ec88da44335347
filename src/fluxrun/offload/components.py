"""Weights that live in the CPU's memory and visit the GPU: pinned where they lie, and never copied back.

diffusers' and accelerate's offloading moves a module away by copying it to the CPU: time for nothing, as inference
changes no weight, and a second set of weights beside the store's, which 64 GB of transformer do not leave room for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fluxrun.offload.tensors import tensor_bytes

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
