"""The ``memory`` group: where the weights lie between and during steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from fluxrun.formatting import GIB
from fluxrun.hardware.machine import CONTEXT_BYTES, Machine
from fluxrun.options.base import NOTHING_MORE, Context, Facts, Option, Resolution, Workload, own_class
from fluxrun.trust import Open
from fluxrun.types import Pipeline

if TYPE_CHECKING:
    import torch

log = logging.getLogger("fluxrun.memory")

LADDER = ("resident", "staged", "balanced", "block_swap", "group", "sequential")
"""From fastest to smallest: ``memory=auto`` steps down it when a run does not fit."""

KNOBS_OF = {"group": ("group_level", "blocks_per_group", "use_stream"), "block_swap": ("blocks_to_swap",)}
"""Knobs that only one option uses; ``auto`` hands them on."""


OTHER_ALGORITHMS = (
    "the VAE's decoder found no room for the workspace of cuDNN's first choice of algorithm: pixels may differ by some "
    "levels from memory=resident's, in this process from now on (a larger memory.budget_gb leaves it room)"
)


class MemoryOption(Option):
    """The knobs all memory options share."""

    budget_gb: Open[float | None] = Field(None, gt=0)
    """GB (2**30 bytes) of GPU memory to stay under (torch's allocator is held to it); None is what is free."""

    group_level: Open[Literal["leaf", "block"]] = "leaf"
    """Group offload: by leaf module or by block."""

    blocks_per_group: Open[int] = Field(1, ge=1)
    """Group offload by block: how many blocks move together."""

    use_stream: Open[bool] = True
    """Group offload: copy the next group while this one computes (CUDA)."""

    blocks_to_swap: Open[int | None] = Field(None, ge=0)
    """Block swap: how many transformer blocks are swapped (fewer than 3 save nothing); None: as few as fit."""

    staged: ClassVar[bool] = False
    """Whether text encoder and the rest are loaded one after the other."""

    offloads: ClassVar[bool] = False
    """Whether the weights are loaded to the CPU's memory and moved by hooks."""

    swaps_blocks: ClassVar[bool] = False
    """Whether offloaded blocks find their weights at one address in every step, those of a module side by side."""

    moves_per_layer: ClassVar[bool] = False
    """Whether weights move inside the transformer's forward, by layer or block."""

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE

    @property
    def prefetches(self) -> bool:
        """Whether layers are fetched ahead, in the order in which the first step used them."""
        return False

    def unused_knobs(self) -> list[str]:
        unused = {knob for name, knobs in KNOBS_OF.items() if self.name not in ("auto", name) for knob in knobs}
        return [knob for knob in self.changed_knobs() if knob in unused]

    def budget_bytes(self, machine: Machine) -> int:
        """GPU memory a run may use: what is free, and never more than the budget."""
        free = machine.gpu.free_bytes if machine.gpu else 0
        return min(free, int(self.budget_gb * GIB)) if self.budget_gb else free

    def limit(self, device: str) -> None:
        """Before anything is loaded: hold torch's allocator to the budget, like a smaller GPU; state.py undoes it."""
        if self.budget_gb is None or not device.startswith("cuda"):
            return
        import torch

        total = torch.cuda.get_device_properties(_number(device)).total_memory
        torch.cuda.set_per_process_memory_fraction(allocator_share(self.budget_gb, total), _number(device))

    def limited(self, device: str) -> Facts:
        """What the allocator says its limit is, where it has one."""
        if not device.startswith("cuda"):
            return {}
        import torch

        share = torch.cuda.get_per_process_memory_fraction(_number(device))
        total = torch.cuda.get_device_properties(_number(device)).total_memory
        return {"allocator_limit_bytes": int(share * total)} if share < 1 else {}


def allocator_share(budget_gb: float, total_bytes: int) -> float:
    """The share of a GPU that torch's allocator may take, so that the whole process stays under the budget."""
    return min(1.0, max(0.0, (budget_gb * GIB - CONTEXT_BYTES) / total_bytes))


class AutoMemory(MemoryOption):
    """The fastest placement whose estimated need fits the budget."""

    def resolve(self, workload: Workload) -> Resolution:
        machine = workload.machine
        if not machine.accelerated or machine.gpu is None:
            return Resolution("resident", f"on {machine.device} there is nothing to offload from")
        budget, needs, ram = self.budget_bytes(machine), workload.needs, workload.ram
        if needs is None or ram is None:
            return Resolution("resident", "the weights' size is not known before loading")
        fitting = [name for name in LADDER if needs[name].bytes <= budget]
        enough = [name for name in fitting if not machine.ram_bytes or ram[name] <= machine.ram_bytes]
        if enough:
            return Resolution(enough[0], needs[enough[0]].described(budget))
        name = fitting[0] if fitting else LADDER[-1]
        if not fitting:
            return Resolution(name, f"nothing fits {budget / GIB:.1f} GB by the estimate; this needs the least")
        have = (
            f"about {ram[name] / GIB:.0f} GB of the computer's own memory, which has {machine.ram_bytes / GIB:.0f} GB"
        )
        note = f"memory={name} keeps the weights in the computer's own memory: it needs {have}"
        return Resolution(name, f"needs {have}; nothing else fits the GPU", note)


class Resident(MemoryOption):
    """All components on the device."""

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        own_class(pipeline, {"_execution_device": property(_device_of(type(pipeline)))})
        return {"resident_bytes": context.weight_facts.get("bytes"), **self.limited(context.device)}


def _device_of(cls: Any) -> Callable[[Any], torch.device]:
    """Where a pipeline computes, without diffusers' look for hooks in every module: 3 ms of each picture.

    A pipeline that is handed out may be given such hooks later: one on the transformer, and diffusers looks itself.
    """

    def execution_device(pipeline: Any) -> torch.device:
        if hasattr(pipeline.transformer, "_hf_hook") or hasattr(pipeline.transformer, "_diffusers_hook"):
            looked_up: torch.device = super(cls, pipeline)._execution_device
            return looked_up
        device: torch.device = next(pipeline.transformer.parameters()).device
        return device

    return execution_device


class Staged(MemoryOption):
    """Text encoder first, for all prompts; then it is freed and the rest is loaded."""

    staged: ClassVar[bool] = True

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        return self.limited(context.device)

    def observe(self, pipeline: Pipeline, context: Context) -> Facts:
        counted = ("prompts_encoded_first", "prompts_known_before", "freed_bytes")
        return {name: context.prompt_counts.get(name, 0) for name in counted}


class Offload(MemoryOption):
    """What the offloading options share: weights in the CPU's memory, an accelerator to move them to."""

    offloads: ClassVar[bool] = True

    def requires(self, machine: Machine) -> str | None:
        if machine.accelerated:
            return None
        return f"offloads from a GPU to the CPU's memory; this run is on {machine.device}, there is nothing to offload"

    def inapplicable(self, workload: Workload) -> str | None:
        if any(declared.method == "bitsandbytes" for declared in workload.declared.values()):
            return "a folder's bitsandbytes weights have their scales beside them, and lose them when they are moved"
        return super().inapplicable(workload)

    def pinned(self, pipeline: Pipeline, context: Context) -> Facts:
        """Page-lock the weights for fast copies."""
        if context.pins is None or not context.device.startswith("cuda"):
            return {}
        facts = context.pins.add(pipeline)
        if refused := facts.get("not_pinned_bytes"):
            text = "memory=%s: %.1f GB of the weights could not be page-locked; the GPU waits while they are copied"
            log.warning(text, self.name, refused / GIB)
        return facts


class Balanced(Offload):
    """Text encoder or transformer on the GPU: one copy per change, none between images of known prompts."""

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        from fluxrun.offload.components import AlternatingOffload

        pinned = self.pinned(pipeline, context)
        AlternatingOffload(pipeline, context.device, context.counters)
        return {**pinned, **self.limited(context.device)}

    def observe(self, pipeline: Pipeline, context: Context) -> Facts:
        return {name: context.counters[name] for name in ("components_moved", "bytes_moved")} | short_of_room(context)


class BlockSwap(Offload):
    """As many transformer blocks as fit stay on the GPU; the others, and the text encoder's, stream through it."""

    swaps_blocks: ClassVar[bool] = True
    moves_per_layer: ClassVar[bool] = True

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """Facts: blocks and how many of them are swapped; a step copies ``swapped_bytes``."""
        from fluxrun.offload.block_swap import PipelineBlockSwap

        pinned = self.pinned(pipeline, context)
        room = self.budget_bytes(context.machine) - CONTEXT_BYTES
        swap = PipelineBlockSwap(
            pipeline, context.device, context.counters,
            room=room, working=context.workload.swapping_bytes, count=self.blocks_to_swap,
        )  # fmt: skip
        return {
            "blocks": len(swap.transformer.blocks),
            "blocks_swapped": len(swap.transformer.swapped),
            "swapped_bytes": sum(block.bytes for block in swap.transformer.swapped),
            **pinned,
            **self.limited(context.device),
        }

    def observe(self, pipeline: Pipeline, context: Context) -> Facts:
        return {name: context.counters[name] for name in ("blocks_copied", "bytes_copied")} | short_of_room(context)


class Sequential(Offload):
    """Sequential offload: one layer on the GPU at a time."""

    moves_per_layer: ClassVar[bool] = True

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        from torch import nn

        pipeline.enable_sequential_cpu_offload(device=context.device)
        modules = [m for m in pipeline.components.values() if isinstance(m, nn.Module)]
        hooks = sum(hasattr(s, "_hf_hook") for m in modules for s in m.modules())
        return {"hooks": hooks, **self.limited(context.device)}


class Group(Offload):
    """Group offload: groups of layers move while others compute; the VAE, which is small, stays on the GPU."""

    moves_per_layer: ClassVar[bool] = True

    @property
    def prefetches(self) -> bool:
        return self.use_stream

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        from fluxrun.offload.groups import group_offload

        streams = self.use_stream and context.device.startswith("cuda")
        # Weights that are pinned in place, diffusers does not copy into pinned memory of its own: twice the weights.
        pinned = self.pinned(pipeline, context) if streams else {}
        groups = group_offload(
            pipeline, context.device, context.counters,
            blocks=self.blocks_per_group if self.group_level == "block" else None, use_stream=streams,
        )  # fmt: skip
        return {"groups": groups, "streams": streams, **pinned, **self.limited(context.device)}

    def observe(self, pipeline: Pipeline, context: Context) -> Facts:
        return short_of_room(context)


def short_of_room(context: Context) -> Facts:
    """How often the decoder had to do without the workspace it asked for; then the user is told what that means."""
    failed = context.counters["decoder_allocations_failed"]
    if failed:
        context.note(OTHER_ALGORITHMS)
    return {"decoder_allocations_failed": failed} if failed else {}


def _number(device: str) -> int:
    """The index of a CUDA device; plain ``cuda`` is torch's current one."""
    import torch

    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index
