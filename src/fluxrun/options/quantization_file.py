"""Options of the ``quantization`` group that take the transformer from one file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from fluxrun.hardware.machine import Machine
from fluxrun.options.base import NOTHING_MORE, Facts
from fluxrun.options.quantization import OnTheFly
from fluxrun.paths import expanded
from fluxrun.trust import Closed

if TYPE_CHECKING:
    import torch
    from torch import nn


class SingleFile(OnTheFly):
    """A transformer from one file of its own; all else, its config included, from the model's folder."""

    file: Annotated[Path | None, Closed("it names a file of this machine, which is read")] = None
    """The transformer's file."""

    suffix: ClassVar[str]

    def input_problem(self) -> str | None:
        if self.file is None:
            return None
        path = expanded(self.file)
        if not path.is_file():
            return f"quantization.file={self.file}: no such file"
        if path.suffix != self.suffix:
            return f"quantization.file={self.file} is no {self.suffix} file"
        return None

    def requires(self, machine: Machine) -> str | None:
        return None if self.file else f"needs quantization.file=FILE, the transformer's {self.suffix} file"

    def loaded_bytes(self, component: str) -> int | None:
        return expanded(self.file).stat().st_size if self.file and component == "transformer" else None

    def converts(self, component: str) -> bool:
        return component == "transformer"

    def unused_knobs(self) -> list[str]:
        return self.changed_knobs("file")

    def load(self, component: str, folder: Path | None, dtype: str) -> nn.Module | None:
        """Always with the folder's config: without one diffusers asks the hub for dev's, whatever the file holds.

        Raises ValueError where the file and the config are not of one model.
        """
        if component != "transformer":
            return None
        if folder is None:
            raise ValueError("a single file takes its config from the model's folder; model.weights=random has none")
        import torch
        from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

        assert self.file is not None
        kind = getattr(torch, dtype)
        loaded: nn.Module = Flux2Transformer2DModel.from_single_file(
            str(expanded(self.file)),
            config=str(folder),
            subfolder="transformer",
            quantization_config=self.diffusers_config(kind),
            torch_dtype=kind,
            local_files_only=True,
        )
        if lacking := [name for name, weight in loaded.named_parameters() if weight.is_meta]:
            raise ValueError(f"{self.file} lacks {len(lacking)} tensors, {lacking[0]} for one")
        return loaded

    def diffusers_config(self, dtype: torch.dtype) -> Any:
        """diffusers' quantization config for the file."""
        raise NotImplementedError


class Gguf(SingleFile):
    """A transformer in a .gguf file, as ComfyUI and llama.cpp use them."""

    suffix: ClassVar[str] = ".gguf"

    @property
    def libraries(self) -> frozenset[str] | None:
        return frozenset({"gguf"})

    def requires(self, machine: Machine) -> str | None:
        return machine.lacks("gguf", "0.10") or super().requires(machine)

    def diffusers_config(self, dtype: torch.dtype) -> Any:
        from diffusers import GGUFQuantizationConfig

        return GGUFQuantizationConfig(compute_dtype=dtype)

    def convert(self, component: nn.Module, name: str, place: str, device: str) -> Facts:
        """It is loaded as it is; says which formats the file has."""
        kinds = {getattr(getattr(p, "quant_type", None), "name", None) for p in component.parameters()}
        return {"format": "gguf " + ", ".join(sorted(kind for kind in kinds if kind))}


class BflFp8(SingleFile):
    """Black Forest Labs' own single file in float8: weights with a scale each or by row."""

    suffix: ClassVar[str] = ".safetensors"

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE

    def diffusers_config(self, dtype: torch.dtype) -> Any:
        from diffusers import BFLQuantizationConfig

        return BFLQuantizationConfig(compute_dtype=dtype)

    def convert(self, component: nn.Module, name: str, place: str, device: str) -> Facts:
        """It is loaded as it is."""
        kinds = {type(m).__name__ for m in component.modules() if type(m).__name__.startswith("BFL")}
        return {"format": "BFL " + ", ".join(sorted(kinds))}
