"""The ``quantization`` group: number format of the matmuls, applied component by component while loading."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fluxrun.hardware.machine import Machine
from fluxrun.options.base import COMPILER, NOTHING_MORE, Context, Facts, Option
from fluxrun.trust import Open
from fluxrun.types import Pipeline

if TYPE_CHECKING:
    from torch import nn


class QuantizationOption(Option):
    """What all quantizations share."""

    quantizes: ClassVar[bool] = True
    """Whether anything is converted."""

    components: Open[tuple[Literal["transformer"], ...]] = ("transformer",)
    """Pipeline components whose linear layers are converted."""

    def quantize(self, component: nn.Module, name: str, device: str) -> Facts:
        """Convert ``component`` in place, right after it was loaded; returns what was converted.

        ``device`` is where it will be used; a pretrained component is still on the CPU then.
        """
        return {}

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """The weights were converted while loading; hand on what was counted then."""
        components = context.weight_facts.get("components", {})
        return {name: facts["quantization"] for name, facts in components.items() if "quantization" in facts}


class NoQuantization(QuantizationOption):
    """The weights as they are."""

    quantizes: ClassVar[bool] = False

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE


class Fp8(QuantizationOption):
    """torchao's dynamic float8 with one scale per row, in the transformer's blocks."""

    @property
    def libraries(self) -> frozenset[str] | None:
        return frozenset({"torchao", COMPILER})

    def requires(self, machine: Machine) -> str | None:
        return machine.needs_cuda((8, 9)) or machine.lacks("torchao", "0.15")

    def quantize(self, component: nn.Module, name: str, device: str) -> Facts:
        """Layer by layer on the GPU, so that the unquantized weights are never there whole; then each to ``device``.

        Raises RuntimeError when not one layer was converted: zero converted is a failure, not a success."""
        if name not in self.components:
            return {}
        import torch
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        linears = {n: m for n, m in component.named_modules() if isinstance(m, torch.nn.Linear)}
        chosen = {n for n, m in linears.items() if _in_block(n) and _divisible(m)}
        before = {n: type(linears[n].weight.data) for n in chosen}
        # torchao's own default also rewrites global inductor settings: compile then takes minutes.
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
        # Also what is to be offloaded: random dev weights loaded in 94-100 s, converted on the CPU in 104 (H200).
        where = device if device.startswith("cuda") else "cuda"
        for linear in (linears[n] for n in chosen):
            quantize_(linear, config, filter_fn=lambda *_: True, device=where)
            linear.to(device)
        converted = sum(type(linears[n].weight.data) is not before[n] for n in chosen)
        if not converted:
            raise RuntimeError(f"torchao converted 0 of {len(linears)} linear layers of the {name}")
        return {
            "component": name,
            "converted": converted,
            "of": len(linears),
            "format": "float8 e4m3, dynamic, per row",
        }


def _in_block(name: str) -> bool:
    return "transformer_blocks" in name


def _divisible(module: nn.Linear) -> bool:
    """float8 matmuls need both dimensions to be multiples of 16."""
    return module.in_features % 16 == 0 and module.out_features % 16 == 0
