"""The ``quantization`` group: number format of the weights, applied component by component while loading."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from fluxrun.hardware.machine import Machine
from fluxrun.options.base import COMPILER, NOTHING_MORE, Context, Facts, Option, Resolution, Workload
from fluxrun.quantization.declared import Declared, declared_by
from fluxrun.quantization.libraries import allow_recompiling, import_library
from fluxrun.trust import Open
from fluxrun.types import Pipeline

if TYPE_CHECKING:
    from torch import nn


def _on_or_off(value: Any) -> Any:
    """YAML reads a bare ``on`` or ``off`` as a truth value."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


QuantizedMatmul = Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)]


class QuantizationOption(Option):
    """What all quantizations share."""

    quantizes: ClassVar[bool] = True
    """Whether anything is converted here: not with weights as they are."""

    dynamic: ClassVar[bool] = False
    """Whether what is multiplied with the weights is quantized as well, in every call."""

    fusable: ClassVar[bool] = False
    """Whether the fused kernels (kernels=fused) read its weights."""

    savable: ClassVar[bool] = False
    """Whether what it made is saved as a folder that diffusers loads (``fluxrun quantize``)."""

    components: Open[tuple[Literal["transformer", "text_encoder"], ...]] = ("transformer",)
    """Pipeline components whose linear layers are converted."""

    skip: Open[tuple[str, ...]] = ()
    """Layers left as they are: parts of their names, * for anything (attn, single_transformer_blocks.0.*)."""

    @property
    def bits(self) -> float | None:
        """Bits that a converted weight takes, its share of the scales included; None: as its file has it."""
        return None

    def converts(self, component: str) -> bool:
        """Whether a component's layers are converted while it is loaded."""
        return self.quantizes and component in self.components

    def quantize(self, component: nn.Module, name: str, place: str, device: str) -> Facts:
        """Convert ``component`` right after it was loaded; returns what was converted.

        ``place`` is where it will lie, ``device`` the run's; a pretrained component is still on the CPU then. Raises
        RuntimeError when not one layer was converted: zero converted is a failure, not a success.
        """
        if not self.converts(name):
            return {}
        return counted_facts(name, component, self.convert(component, name, place, device))

    def input_problem(self) -> str | None:
        """What is wrong with a file that it was given; the run is refused then. Pure."""
        return None

    def loaded_bytes(self, component: str) -> int | None:
        """Bytes of a component that it loads from a file of its own."""
        return None

    def load(self, component: str, folder: Path | None, dtype: str) -> nn.Module | None:
        """A component from a file of its own instead of the model's; None: as the model has it."""
        return None

    def convert(self, component: nn.Module, name: str, place: str, device: str) -> Facts:
        """What ``quantize`` does to the component itself, layer by layer; returns ``format`` and what else it knows."""
        raise NotImplementedError

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """The weights were converted while loading; hand on what was counted then."""
        components = context.weight_facts.get("components", {})
        found = {name: facts["quantization"] for name, facts in components.items() if "quantization" in facts}
        if any("dequantizers" in facts for facts in found.values()):
            allow_recompiling()
        return found

    def chosen(self, component: nn.Module) -> dict[str, nn.Linear]:
        """The linear layers to convert, by name: those in a component's blocks, but for ``skip``."""
        from torch import nn

        linears = {name: layer for name, layer in component.named_modules() if isinstance(layer, nn.Linear)}
        return {name: layer for name, layer in linears.items() if _in_block(name) and not self.skips(name)}

    def skips(self, layer: str) -> bool:
        """Whether a layer is to be left as it is."""
        return any(fnmatchcase(layer, f"*{pattern}*") for pattern in self.skip)


class NoQuantization(QuantizationOption):
    """The weights as they are; a checkpoint that is quantized already stays so (quantization=checkpoint)."""

    quantizes: ClassVar[bool] = False
    fusable: ClassVar[bool] = True

    def resolve(self, workload: Workload) -> Resolution | None:
        return Resolution("checkpoint", described(workload.declared)) if workload.declared else None

    def unused_knobs(self) -> list[str]:
        return self.changed_knobs()

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE


class Checkpoint(QuantizationOption):
    """The quantization that the checkpoint itself declares, component by component, in its config.json."""

    inherent: ClassVar[bool] = True

    quantized_matmul: Open[QuantizedMatmul] = "auto"
    """SDNQ: multiply in the quantized format, too; ``auto``: 8 bits, on a GPU. Overrules what a checkpoint says."""

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE  # beside those that the checkpoint declares, which the plan knows

    def inapplicable(self, workload: Workload) -> str | None:
        return None if workload.declared else "no component of this checkpoint declares a quantization of its own"

    def converts(self, component: str) -> bool:
        return False

    def quantize(self, component: nn.Module, name: str, place: str, device: str) -> Facts:
        declared = declared_by({"quantization_config": _own_config(component)})
        if declared is None:
            return {}
        facts: Facts = {"format": str(declared)}
        if declared.method == "sdnq":
            facts |= import_library("sdnq", device)
            facts |= set_quantized_matmul(component, self.quantized_matmul, device)
        return counted_facts(name, component, facts)

    def unused_knobs(self) -> list[str]:
        return self.changed_knobs("quantized_matmul")


class OnTheFly(QuantizationOption):
    """What all options share that quantize ordinary weights while they are loaded."""

    def inapplicable(self, workload: Workload) -> str | None:
        if workload.declared:
            return f"the checkpoint is quantized already ({described(workload.declared)})"
        return None


class TorchaoOption(OnTheFly):
    """torchao's, in the blocks of a component."""

    config_name: ClassVar[str]
    """torchao's config class."""
    format: ClassVar[str]
    """What the record calls the result."""

    @property
    def bits(self) -> float | None:
        return 8

    @property
    def libraries(self) -> frozenset[str] | None:
        return frozenset({"torchao"})

    def requires(self, machine: Machine) -> str | None:
        return machine.lacks("torchao", "0.15")

    def settings(self) -> dict[str, Any]:
        """Arguments of torchao's config. Its own default also rewrites global inductor settings: compile then takes
        minutes."""
        return {"set_inductor_config": False}

    def convert(self, component: nn.Module, name: str, place: str, device: str) -> Facts:
        """Layer by layer on the run's device, so that the unquantized weights are never there whole.

        Also what is to be offloaded: random dev weights loaded in 94-100 s, converted on the CPU in 104 (H200).
        """
        from torchao import quantization

        config = getattr(quantization, self.config_name)(**self.settings())
        for linear in self.chosen(component).values():
            quantization.quantize_(linear, config, filter_fn=lambda *_: True, device=device)
            linear.to(place)
        return {"format": self.format}


class Fp8(TorchaoOption):
    """torchao's dynamic float8 with one scale per row."""

    dynamic: ClassVar[bool] = True
    fusable: ClassVar[bool] = True
    config_name: ClassVar[str] = "Float8DynamicActivationFloat8WeightConfig"
    format: ClassVar[str] = "float8 e4m3, dynamic, per row"

    def requires(self, machine: Machine) -> str | None:
        return machine.needs_cuda((8, 9)) or super().requires(machine)

    def settings(self) -> dict[str, Any]:
        from torchao.quantization import PerRow

        return {**super().settings(), "granularity": PerRow()}

    def chosen(self, component: nn.Module) -> dict[str, nn.Linear]:
        """float8 matmuls need both dimensions to be multiples of 16."""
        found = super().chosen(component)
        return {n: m for n, m in found.items() if m.in_features % 16 == 0 and m.out_features % 16 == 0}


class Int8(TorchaoOption):
    """torchao's dynamic int8: weights by row, what is multiplied with them by token."""

    dynamic: ClassVar[bool] = True
    config_name: ClassVar[str] = "Int8DynamicActivationInt8WeightConfig"
    format: ClassVar[str] = "int8, dynamic, per row"


class Int8WeightOnly(TorchaoOption):
    """torchao's int8 weights; multiplied in the run's dtype."""

    config_name: ClassVar[str] = "Int8WeightOnlyConfig"
    format: ClassVar[str] = "int8 weights, per row"


class Fp8WeightOnly(TorchaoOption):
    """torchao's float8 weights; multiplied in the run's dtype."""

    config_name: ClassVar[str] = "Float8WeightOnlyConfig"
    format: ClassVar[str] = "float8 e4m3 weights, per row"


SDNQ_FORMATS: dict[str, tuple[str, float]] = {
    "int8": ("int8", 8), "int6": ("int6", 6), "uint4": ("uint4", 4), "float8_e4m3fn": ("float8_e4m3fn", 8),
    "fp4": ("float4_e2m1fn", 4), "dynamic": ("uint4", 6),
}  # fmt: skip
"""sdnq's name of each format, and the bits of a weight; ``dynamic`` takes for each layer what keeps its error low."""


class Sdnq(OnTheFly):
    """SDNQ's integers and floats of 4 to 8 bits, with groups, a low-rank part and rotations."""

    savable: ClassVar[bool] = True

    weights_dtype: Open[Literal["int8", "int6", "uint4", "float8_e4m3fn", "fp4", "dynamic"]] = "int8"
    """Format of the weights; ``dynamic`` chooses one per layer, of at least 4 bits, by the error it makes."""

    group_size: Open[int] = Field(0, ge=-2)
    """Weights that share a scale; 0: as the format asks for, -1: a row, -2: the whole tensor."""

    svd_rank: Open[int] = Field(0, ge=0)
    """Rank of the part that is kept in full precision beside the quantized rest (SVDQuant); 0: none."""

    hadamard: Open[bool] = False
    """Rotate the weights before they are quantized: spreads outliers."""

    quantized_matmul: Open[QuantizedMatmul] = "auto"
    """Multiply in the quantized format, too; ``auto``: 8 bits, on a GPU."""

    @property
    def bits(self) -> float | None:
        bits = SDNQ_FORMATS[self.weights_dtype][1]
        group = self.group_size if self.group_size > 0 else 0 if bits == 8 else 64
        return bits + (32 * (2 if self.weights_dtype == "uint4" else 1) / group if group else 0)

    @property
    def libraries(self) -> frozenset[str] | None:
        return frozenset({"sdnq", COMPILER})

    def requires(self, machine: Machine) -> str | None:
        return machine.lacks("sdnq", "0.2.8")

    def convert(self, component: nn.Module, name: str, place: str, device: str) -> Facts:
        library = import_library("sdnq", device)
        from sdnq import sdnq_post_load_quant
        from torch import nn

        linears = [n for n, layer in component.named_modules() if isinstance(layer, nn.Linear)]
        matmul = multiplies_quantized(self.quantized_matmul, self.weights_dtype, device)
        sdnq_post_load_quant(
            component,
            weights_dtype=SDNQ_FORMATS[self.weights_dtype][0],
            use_dynamic_quantization=self.weights_dtype == "dynamic",
            group_size=self.group_size,
            use_svd=self.svd_rank > 0,
            svd_rank=self.svd_rank or 32,
            use_hadamard=self.hadamard,
            use_quantized_matmul=matmul,
            modules_to_not_convert=[f"{n}.weight" for n in linears if self.skips(n)],
            quantization_device=device,
            return_device=place,
        )
        declared = declared_by({"quantization_config": _own_config(component)})
        return {"format": str(declared), "quantized_matmul": matmul, **library}


class Nf4(OnTheFly):
    """bitsandbytes' four-bit normal floats in blocks of 64; multiplied in the run's dtype."""

    @property
    def bits(self) -> float | None:
        return 4.5

    @property
    def libraries(self) -> frozenset[str] | None:
        return frozenset({"bitsandbytes", COMPILER})

    def requires(self, machine: Machine) -> str | None:
        return machine.needs_cuda() or machine.lacks("bitsandbytes", "0.46")

    def convert(self, component: nn.Module, name: str, place: str, device: str) -> Facts:
        """Layer by layer on the run's device."""
        import_library("bitsandbytes", device)
        from fluxrun.quantization.nf4 import BLOCK, Nf4Linear

        for path, linear in self.chosen(component).items():
            parent, _, child = path.rpartition(".")
            setattr(component.get_submodule(parent), child, Nf4Linear(linear, place, device))
        return {"format": f"nf4, groups of {BLOCK}"}


# --- what several of them do ------------------------------------------------------------------------------------------


def described(declared: Mapping[str, Declared]) -> str:
    """``transformer: sdnq uint4, SVD rank 32; text_encoder: …``."""
    return "; ".join(f"{component}: {text}" for component, text in declared.items())


def counted_facts(name: str, component: nn.Module, facts: Facts) -> Facts:
    """The facts of a quantized component, with what is counted. Raises RuntimeError when that is nothing."""
    from fluxrun.quantization.layers import counted

    count = counted(component)
    if not count["converted"]:
        raise RuntimeError(f"0 of {count['of']} linear layers of the {name} are quantized")
    return {"component": name, **count, **facts}


def multiplies_quantized(asked: str, format: str, device: str) -> bool:
    """Whether SDNQ multiplies in the quantized format.

    On a CPU float8 takes a minute for a small picture. On an H200 int8 takes a step of klein-4B from 62 to 49 ms
    compiled, and uint4 from 88 to 120 ms eager, compiled 65 either way.
    """
    on_gpu = device.startswith("cuda")
    if not on_gpu and "float" in format:
        return False
    return asked == "on" or (asked == "auto" and on_gpu and "8" in format)


def set_quantized_matmul(component: nn.Module, asked: str, device: str) -> Facts:
    """Switch an SDNQ component's matmuls over, whatever it was saved with."""
    from sdnq.loader import apply_sdnq_options_to_model

    config = _own_config(component) or {}
    matmul = multiplies_quantized(asked, str(config.get("weights_dtype")), device)
    if bool(config.get("use_quantized_matmul")) != matmul:
        apply_sdnq_options_to_model(component, use_quantized_matmul=matmul)
    return {"quantized_matmul": matmul}


def _own_config(component: nn.Module) -> dict[str, Any] | None:
    """The quantization that a loaded component's config declares: diffusers' is a mapping, transformers' an object."""
    config: Any = getattr(component, "config", None)
    if config is None:
        return None
    get = getattr(config, "get", None)
    found = get("quantization_config") if get else getattr(config, "quantization_config", None)
    if found is None or isinstance(found, dict):
        return found
    plain: dict[str, Any] = found.to_dict()
    return plain


def _in_block(name: str) -> bool:
    return "transformer_blocks" in name or ".layers." in f".{name}"
