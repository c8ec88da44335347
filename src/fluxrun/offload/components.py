"""Weights that are kept on the CPU and copied to the GPU for as long as they are needed; they are never copied back.

diffusers' and accelerate's offloading moves a module away by copying it to the CPU: time for nothing, as inference
changes no weight, and a second set of weights beside the store's, which 64 GB of transformer do not leave room for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import nn

from fluxrun.offload.tensors import tensor_bytes
from fluxrun.types import Pipeline

P = ParamSpec("P")
R = TypeVar("R")


class Slot(NamedTuple):
    """A parameter or buffer of a module, and where the module keeps it."""

    owner: nn.Module
    name: str
    tensor: torch.Tensor

    def assign(self, tensor: torch.Tensor) -> None:
        """Let the module use another tensor. Assigned past ``nn.Module``'s own checks, which take time and room."""
        if self.name in self.owner._buffers:
            self.owner._buffers[self.name] = tensor
        else:
            assert isinstance(tensor, nn.Parameter)
            self.owner._parameters[self.name] = tensor


class AlternatingOffload:
    """Either the text encoder or the transformer is on the GPU, the VAE always.

    The pipeline's own methods say which one is needed: ``encode_prompt`` is the text encoder's, ``prepare_latents``
    comes before the transformer. No hook sits in a module's forward, so that torch.compile and step caches see what
    they expect.
    """

    def __init__(self, pipeline: Pipeline, device: str, counters: Counter[str]) -> None:
        components = {"text_encoder": pipeline.text_encoder, "transformer": pipeline.transformer}
        self.components = {
            name: OffloadedWeights(slots(module))
            for name, module in components.items()
            if isinstance(module, nn.Module)
        }
        self.device, self.counters = torch.device(device), counters
        self.onloaded: str | None = None
        """The component that is on the GPU now."""
        keep_vae_on(pipeline, device, counters)
        pipeline.encode_prompt = self._before(pipeline.encode_prompt, "text_encoder")
        pipeline.prepare_latents = self._before(pipeline.prepare_latents, "transformer")

    def onload(self, name: str) -> None:
        """Copy one component to the GPU; the other one's copy is freed first."""
        if name == self.onloaded or name not in self.components:
            return
        for component in self.components.values():
            component.offload()
        self.onloaded = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # a large component does not fit into the holes another one leaves
        self.counters["bytes_moved"] += self.components[name].onload(self.device)
        self.counters["components_moved"] += 1
        self.onloaded = name

    def _before(self, method: Callable[P, R], name: str) -> Callable[P, R]:
        """``method`` with the component on the GPU, unless it is called with embeddings that are made already."""

        def onload_and_call(*args: P.args, **kwargs: P.kwargs) -> R:
            if kwargs.get("prompt_embeds") is None:
                self.onload(name)
            return method(*args, **kwargs)

        return onload_and_call


def keep_vae_on(pipeline: Pipeline, device: str, counters: Counter[str]) -> None:
    """Put the VAE, a hundredth of dev's weights, on ``device`` for good, and give its decoder room to work in.

    It is the first module of a pipeline, whose device diffusers takes for all inputs.

    cuDNN's first choice of algorithm for a convolution needs a workspace. Where that cannot be had, torch takes the
    next one, whose last bits differ, and remembers it for the whole process. So what the steps before have left in the
    allocator's cache is given back first; ``counters`` counts the allocations that failed all the same.
    """
    pipeline.vae.to(device)  # type: ignore[arg-type]  # diffusers' stub takes ``self`` for the first argument
    if device.startswith("cuda"):
        pipeline.vae.decode = partial(_decode_with_room, pipeline.vae.decode, device, counters)


def _decode_with_room(
    decode: Callable[P, R], device: str, counters: Counter[str], *args: P.args, **kwargs: P.kwargs
) -> R:
    torch.cuda.empty_cache()
    failed = torch.cuda.memory_stats(device)["num_ooms"]
    try:
        return decode(*args, **kwargs)
    finally:
        counters["decoder_allocations_failed"] += torch.cuda.memory_stats(device)["num_ooms"] - failed


class OffloadedWeights:
    """Parameters and buffers whose originals stay on the CPU: onloaded, their modules use copies on the GPU."""

    def __init__(self, originals: Iterable[Slot]) -> None:
        self.originals = list(originals)

    def onload(self, device: torch.device) -> int:
        """Copy every weight and buffer to ``device``, tied ones once; returns the bytes copied."""
        copies: dict[int, torch.Tensor] = {}
        for slot in self.originals:
            if id(slot.tensor) not in copies:
                copies[id(slot.tensor)] = copied(slot.tensor, device)
            slot.assign(copies[id(slot.tensor)])
        return tensor_bytes(copies.values())

    def offload(self) -> None:
        """Give the modules their originals back; nothing is copied, and the copies are freed."""
        for slot in self.originals:
            slot.assign(slot.tensor)


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on another device; a parameter stays one (torchao's tensors included)."""
    moved = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def slots(module: nn.Module) -> Iterator[Slot]:
    """Each parameter and buffer of a module and those inside it."""
    for owner in module.modules():
        tensors = (*owner._parameters.items(), *owner._buffers.items())
        yield from (Slot(owner, name, tensor) for name, tensor in tensors if tensor is not None)
