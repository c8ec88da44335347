"""The ``memory`` group: where the weights lie between and during steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fluxrun.config import Facts, Option
from fluxrun.machine import GIB, Machine

if TYPE_CHECKING:
    from fluxrun.context import Context
    from fluxrun.plan import Plan

LADDER = ("resident", "staged", "balanced", "group", "sequential")
"""From fastest to smallest: ``memory=auto`` steps down it when a run does not fit."""


class MemoryKnobs(Option):
    """The knobs all memory options share."""

    budget_gb: float | None = Field(None, gt=0)
    """GB (2**30 bytes) of GPU memory to stay under; None is what is free."""

    group_level: Literal["leaf", "block"] = "leaf"
    """Group offload: by leaf module or by block."""

    blocks_per_group: int = Field(1, ge=1)
    """Group offload by block: how many blocks move together."""

    use_stream: bool = True
    """Group offload: copy the next group while this one computes (CUDA)."""

    staged: bool = Field(False, frozen=True, exclude=True)
    """Whether text encoder and the rest are loaded one after the other."""

    offloads: bool = Field(False, frozen=True, exclude=True)
    """Whether the weights are loaded to the CPU's memory and moved by hooks."""

    def unused_knobs(self) -> list[str]:
        used = {"budget_gb"} if self.name == "auto" else {"group_level", "blocks_per_group", "use_stream"}
        used = used if self.name in ("auto", "group") else set()
        fields = type(self).model_fields
        knobs = ("budget_gb", "group_level", "blocks_per_group", "use_stream")
        return [k for k in knobs if k not in used and getattr(self, k) != fields[k].get_default()]


class AutoMemory(MemoryKnobs):
    """The fastest placement whose estimated need fits the budget."""

    def resolve(self, plan: Plan) -> tuple[str, str]:
        from fluxrun.plan import memory_needs

        machine = plan.machine
        if not machine.accelerated or machine.gpu is None:
            return "resident", f"on {machine.device} there is nothing to offload from"
        budget = self.budget_gb * GIB if self.budget_gb else machine.gpu.free_bytes
        needs = memory_needs(plan)
        if needs is None:
            return "resident", "the weights' size is not known before loading"
        for name in LADDER:
            if needs[name] <= budget:
                return name, f"needs about {needs[name] / GIB:.1f} GB of {budget / GIB:.1f} GB"
        return LADDER[-1], f"nothing fits {budget / GIB:.1f} GB by the estimate; this needs the least"


class Resident(MemoryKnobs):
    """All components on the device."""

    def apply(self, pipeline: Any, context: Context) -> Facts:
        return {"resident_bytes": context.weight_facts.get("bytes")}


class Staged(MemoryKnobs):
    """Text encoder first, for all prompts; then it is freed and the rest is loaded."""

    staged: bool = Field(True, frozen=True, exclude=True)

    def apply(self, pipeline: Any, context: Context) -> Facts:
        return {}

    def observe(self, pipeline: Any, context: Context) -> Facts:
        return {
            "prompts_encoded_first": context.counters["prompts_encoded_first"],
            "freed_bytes": context.counters["freed_bytes"],
        }


class Offload(MemoryKnobs):
    """What the offloading options share: weights in the CPU's memory, an accelerator to move them to."""

    offloads: bool = Field(True, frozen=True, exclude=True)

    def requires(self, machine: Machine) -> str | None:
        if machine.accelerated:
            return None
        return f"offloads from a GPU to the CPU's memory; this run is on {machine.device}, there is nothing to offload"


class Balanced(Offload):
    """Model offload: one component on the GPU at a time."""

    def apply(self, pipeline: Any, context: Context) -> Facts:
        pipeline.enable_model_cpu_offload(device=context.device)
        return {"hooks": len(pipeline._all_hooks)}


class Sequential(Offload):
    """Sequential offload: one layer on the GPU at a time."""

    def apply(self, pipeline: Any, context: Context) -> Facts:
        pipeline.enable_sequential_cpu_offload(device=context.device)
        modules = [m for m in pipeline.components.values() if hasattr(m, "modules")]
        return {"hooks": sum(hasattr(s, "_hf_hook") for m in modules for s in m.modules())}


class Group(Offload):
    """Group offload: groups of layers move while others compute."""

    def apply(self, pipeline: Any, context: Context) -> Facts:
        import torch

        streams = self.use_stream and context.device.startswith("cuda")
        pipeline.enable_group_offload(
            onload_device=torch.device(context.device),
            offload_device=torch.device("cpu"),
            offload_type=f"{self.group_level}_level",
            num_blocks_per_group=self.blocks_per_group if self.group_level == "block" else None,
            use_stream=streams,
        )
        return {"groups": _groups(pipeline), "streams": streams}


def _groups(pipeline: Any) -> int:
    """Modules whose group-offloading hook diffusers really registered."""
    modules = (s for m in pipeline.components.values() if hasattr(m, "modules") for s in m.modules())
    return sum(
        registry.get_hook("group_offloading") is not None
        for module in modules
        if (registry := getattr(module, "_diffusers_hook", None)) is not None
    )
