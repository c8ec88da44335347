"""The ``lora`` group: low-rank adapters beside the transformer's weights, which stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fluxrun.formatting import nearest, shorten
from fluxrun.hardware.machine import Machine
from fluxrun.options.base import COMPILER, NOTHING_MORE, Context, Facts, Option, Workload
from fluxrun.trust import Closed, Open
from fluxrun.types import Pipeline

if TYPE_CHECKING:
    from torch import nn

ADAPTER = "fluxrun"
"""peft's name of the one adapter that stands for all files."""


class LoraFile(BaseModel):
    """One LoRA file: where it is, and how strongly it is applied."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: Path | None = None
    """A .safetensors file, a folder with one in it, or a hub id (OWNER/NAME)."""

    bundled: str | None = Field(None, pattern=r"^[\w-]+$")
    """Instead of ``path``, the name of one that comes with fluxrun, for example night."""

    weight_name: str | None = None
    """Which file of the folder, or of the hub's repository; needed only where there are several."""

    scale: float = Field(1.0, allow_inf_nan=False)
    """Its strength; 0 draws as without it, below 0 the opposite."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        if isinstance(data, str | Path):
            return {"path": data}
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {shorten(key)!r}: {nearest(str(key), list(cls.model_fields))}")
        return data

    @model_validator(mode="after")
    def _one_place(self) -> LoraFile:
        if (self.path is None) == (self.bundled is None):
            raise ValueError("a LoRA file is given by its path (or hub id), or by the name of a bundled one")
        return self

    @property
    def label(self) -> str:
        """How the file is called in lines and tables."""
        name = self.bundled or str(self.path)
        return f"{name}/{self.weight_name}" if self.weight_name else name


class LoraOption(Option):
    """The knobs of both options, so that ``lora.files`` stays while a sweep swaps them."""

    adapts: ClassVar[bool] = False
    """Whether adapters stand beside the transformer's weights."""

    files: Annotated[tuple[LoraFile, ...], Closed("it names files of this machine, or downloads")] = ()
    """LoRA files, applied together: ``[{path: FILE, FOLDER or HUB/ID, weight_name: …, scale: 0.8}]``."""

    scale: Open[float] = Field(1.0, allow_inf_nan=False)
    """One factor over the scales of all files."""


class NoLora(LoraOption):
    """The model as it is."""

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE

    def unused_knobs(self) -> list[str]:
        return self.changed_knobs()


class Adapters(LoraOption):
    """LoRA files beside the weights, through diffusers and peft: other files and scales are swapped in place."""

    adapts: ClassVar[bool] = True

    @property
    def libraries(self) -> frozenset[str] | None:
        return frozenset({"peft", COMPILER})

    def requires(self, machine: Machine) -> str | None:
        return machine.lacks("peft", "0.18")

    def inapplicable(self, workload: Workload) -> str | None:
        if not self.files:
            return "no file is given: lora=adapters 'lora.files=[{path: FILE.safetensors, scale: 0.8}]'"
        return None

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """Load the files as one adapter. Raises RuntimeError where peft made fewer layers than the files name."""
        assert context.lora is not None
        _keep_dtype(pipeline.transformer, context.dtype)
        pipeline.load_lora_weights(self._tensors(pipeline, context), adapter_name=ADAPTER)
        made = sum(ADAPTER in getattr(module, "lora_A", ()) for module in pipeline.transformer.modules())
        if made < len(context.lora.room.layers):
            raise RuntimeError(f"peft made {made} of {len(context.lora.room.layers)} layers")
        pipeline.transformer.requires_grad_(False).eval()
        return self._facts(context, swapped=False)

    def swap(self, pipeline: Pipeline, context: Context) -> Facts:
        """Put this option's files and scale in the place of those the pipeline was built with, at their addresses."""
        pipeline.load_lora_weights(self._tensors(pipeline, context), adapter_name=ADAPTER, hotswap=True)
        return self._facts(context, swapped=True)

    def _tensors(self, pipeline: Pipeline, context: Context) -> dict[str, Any]:
        import torch

        assert context.lora is not None
        return context.lora.state_dict(self.scale, getattr(torch, context.dtype), pipeline.transformer.device)

    def _facts(self, context: Context, *, swapped: bool) -> Facts:
        assert context.lora is not None
        adapters, room = context.lora.adapters, context.lora.room
        for adapter in adapters:
            for text in adapter.dropped:
                context.note(f"{adapter.name}: {text}")
        return {
            "adapters": len(adapters),
            "layers_matched": len({layer for adapter in adapters for layer in adapter.layers}),
            "rank": max((rank for adapter in adapters for rank in adapter.ranks.values()), default=0),
            "scale": self.scale,
            "files": [
                {
                    "name": adapter.name,
                    "sha256": adapter.sha256,
                    "layers": len(adapter.layers),
                    "rank": max(adapter.ranks.values()),
                    "scale": adapter.scale,
                    **({"dropped": list(adapter.dropped)} if adapter.dropped else {}),
                }
                for adapter in adapters
            ],
            "room": {"layers": len(room.layers), "rank": room.rank},
            "hot_swapped": swapped,
        }


def _keep_dtype(transformer: nn.Module, dtype: str) -> None:
    """Have peft make adapters in the run's dtype also beside float8 weights, whose own it would take."""
    import torch

    module: Any  # torch's types let a module have tensors and modules only
    for module in transformer.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.itemsize == 1:
            module.compute_dtype = getattr(torch, dtype)
