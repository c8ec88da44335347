"""A component's modules without its weights, on the meta device: in no time, no memory and with no random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import nn
from torch.overrides import TorchFunctionMode

from fluxrun.architectures import architecture
from fluxrun.options.model import Flux2Model
from fluxrun.reading import parse_json, read_text
from fluxrun.types import Json
from fluxrun.weights.location import Located

CLASSES: dict[str, Any] = {"transformer": Flux2Transformer2DModel, "vae": AutoencoderKLFlux2}


class NoInitOnMeta(TorchFunctionMode):
    """Within, in this thread: ``torch.nn.init`` leaves tensors of the meta device alone.

    There is nothing in them to set; torch would import sympy for it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


def skeleton(
    model: Flux2Model, located: Located, name: str, dtype: torch.dtype, changed: Mapping[str, Json] | None = None
) -> nn.Module | None:
    """A transformer or VAE of this model, with parts of its config ``changed``; None before it was downloaded."""
    config = component_config(model, located, name)
    if config is None:
        return None
    with torch.device("meta"), NoInitOnMeta():
        module: nn.Module = CLASSES[name].from_config({**config, **(changed or {})})
    return nn.Module.to(module, dtype).eval().requires_grad_(False)  # diffusers' own warns of nothing


def component_config(model: Flux2Model, located: Located, name: str) -> dict[str, Any] | None:
    """The arguments of a component's class; None while its folder is not on this disk."""
    if located.folder is not None:
        config = parse_json(read_text(located.folder / name / "config.json"))
        return {key: value for key, value in config.items() if key != "quantization_config"}
    if located.kind == "random" and model.architecture is not None:
        sizes = architecture(model.architecture, model.pipeline)
        return dict(sizes.transformer if name == "transformer" else sizes.vae)
    return None
