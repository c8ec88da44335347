"""Weights: loaded or built once, component by component, kept in a store, handed out as fresh module shells.

This module is heavy (torch, diffusers, transformers); nothing light may import it. Where a checkpoint lies and
whether it is whole is ``find.py``'s business and is settled before anything here runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from fluxrun.architectures import HIDDEN_STATES_READ, MODEL_COMPONENTS, Family, PipelineKind, family
from fluxrun.errors import ConfigError, FluxrunError, python_reason
from fluxrun.offload.tensors import tensor_bytes
from fluxrun.options.model import Flux2Model
from fluxrun.quantization.layers import parameter_count
from fluxrun.quantization.libraries import import_library
from fluxrun.types import Component, Json, Pipeline
from fluxrun.weights.chat_template import check_templates, templates_of
from fluxrun.weights.download import download
from fluxrun.weights.find import find_weights
from fluxrun.weights.folder import component_classes, variant_of
from fluxrun.weights.location import Located
from fluxrun.weights.random_weights import random_source
from fluxrun.weights.store import Base, Part
from fluxrun.weights.text_encoder import NeededLayers

if TYPE_CHECKING:
    from diffusers.models._modeling_parallel import TensorParallelConfig

Quantize = Callable[[nn.Module, str], Mapping[str, Json]]


def _as_it_is(component: nn.Module, name: str) -> Mapping[str, Json]:
    return {}


def _from_the_model(name: str, folder: Path | None) -> nn.Module | None:
    return None


@dataclass(frozen=True)
class Conversion:
    """What a quantization does to the components while they are loaded."""

    quantize: Quantize = _as_it_is
    """Called with each model component, and its name, before the next one is loaded; returns facts. A pretrained
    component is then still on the CPU, so that a quantizer can move it layer by layer (torchao's
    ``quantize_(..., device=...)``); a random one is already in its place."""
    instead: Callable[[str, Path | None], nn.Module | None] = _from_the_model
    """A component that comes from a file of its own, by name and checkpoint folder; None: from the model's."""
    device: str | None = None
    """The run's device, where that is another one than the weights are placed on."""
    tensor_parallel: TensorParallelConfig | None = None
    """By what the transformer's weights are spread out over several GPUs; None: they are not."""


Progress = Callable[[str], None]

PARTS: dict[Part, tuple[str, ...]] = {
    "text": ("text_encoder", "tokenizer"),
    "image": ("transformer", "vae", "scheduler"),
    "all": ("transformer", "text_encoder", "tokenizer", "vae", "scheduler"),
}
"""Pipeline components of each part, in the order in which they are loaded: what may be quantized first, while there is
still room for it as it was."""


def _tensors(modules: Iterable[nn.Module]) -> Iterator[torch.Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def _silent(_: str) -> None:
    return None


def load(
    model: Flux2Model,
    *,
    dtype: str,
    device: str,
    part: Part = "all",
    conversion: Conversion | None = None,
    progress: Progress = _silent,
    located: Located | None = None,
) -> Base:
    """Load or build ``part`` of ``model`` as ``dtype`` (a torch dtype's name) onto ``device``.

    ``progress`` gets a line per stage. Raises ConfigError when the checkpoint is missing, partial or of another kind.
    """
    conversion = conversion or Conversion()
    located = located or find_weights(model)
    parts: dict[str, Component] = dict.fromkeys(PARTS["all"])
    facts: dict[str, Any] = {"source": located.source, "revision": located.revision, "components": {}}
    needed = _needed_layers(model, located.pipeline)
    folder = None if located.kind == "random" else download(located, progress)
    make: Callable[[str], Component] = (
        partial(_pretrained, folder, dtype, model.variant, needed, conversion.tensor_parallel)
        if folder
        else random_source(model, dtype, device, needed)
    )
    for name in PARTS[part]:
        if declared := located.declared.get(name):
            # First: transformers passes over a quantization whose library it does not know, and misreads the weights.
            import_library(declared.package or declared.method, conversion.device or device)
        progress(f"{'loading' if folder else 'building'} {name}")
        other = conversion.instead(name, folder)
        component = parts[name] = make(name) if other is None else other
        if name == "tokenizer" and folder and model.bundled is None:
            check_templates(templates_of(component), folder / name)
        if isinstance(component, nn.Module):
            facts["components"][name] = _settle(component, name, device, conversion)
        if name == "text_encoder" and needed is not None:
            facts["components"][name] |= needed.facts(getattr(torch, dtype).itemsize)
    pipeline = _assemble(family(located.pipeline), located.distilled, parts)
    modules = [module for module in parts.values() if isinstance(module, nn.Module)]
    facts["parameters"] = sum(component["parameters"] for component in facts["components"].values())
    facts["bytes"] = tensor_bytes(_tensors(modules))
    return Base(pipeline, facts, facts["bytes"])


def _settle(module: nn.Module, name: str, device: str, conversion: Conversion) -> dict[str, Any]:
    """Freeze, quantize and place one component; returns its facts."""
    module.eval().requires_grad_(False)
    parameters = parameter_count(module)
    quantized = conversion.quantize(module, name)
    module.to(device)
    shares = conversion.tensor_parallel if name == "transformer" else None
    # Of a file only this process's share was read; random weights are made whole.
    if shares is not None and isinstance(module, ModelMixin) and module._parallel_config is None:
        module.enable_parallelism(config=shares)
    return {
        "class": type(module).__name__,
        "parameters": parameters,
        "bytes": tensor_bytes(_tensors([module])),
        **({"quantization": quantized} if quantized else {}),
    }


def _assemble(kind: Family, distilled: bool, parts: Mapping[str, Component]) -> Pipeline:
    """The pipeline object of ``parts``; missing ones stay None. What is drawn with may be another: see ``shell``."""
    cls: Any = pipeline_class(kind)
    pipeline: Pipeline = cls(**parts, is_distilled=distilled) if kind == "klein" else cls(**parts)
    return pipeline


def pipeline_class(kind: PipelineKind) -> type[DiffusionPipeline]:
    """diffusers' class, imported when it is asked for: each brings libraries that the other does without."""
    if kind == "klein":
        from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline

        return Flux2KleinPipeline
    if kind == "klein_inpaint":
        from diffusers.pipelines.flux2.pipeline_flux2_klein_inpaint import Flux2KleinInpaintPipeline

        return Flux2KleinInpaintPipeline
    if kind == "klein_kv":
        from diffusers.pipelines.flux2.pipeline_flux2_klein_kv import Flux2KleinKVPipeline

        return Flux2KleinKVPipeline
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

    return Flux2Pipeline


# --- pretrained -----------------------------------------------------------------------------------


def _needed_layers(model: Flux2Model, pipeline: PipelineKind) -> NeededLayers | None:
    """What is cut from the text encoder; None when all of it is wanted."""
    if model.text_encoder_layers == "all":
        return None
    return NeededLayers(model.text_encoder_out_layers or HIDDEN_STATES_READ[family(pipeline)])


class FromPretrained(TypedDict):
    """Arguments of ``from_pretrained``, the same for diffusers' and transformers' models."""

    subfolder: str
    variant: str | None
    local_files_only: bool
    trust_remote_code: bool
    dtype: torch.dtype


def _pretrained(
    folder: Path,
    dtype: str,
    variant: str | None,
    needed: NeededLayers | None,
    tensor_parallel: TensorParallelConfig | None,
    name: str,
) -> Component:
    """One component of a diffusers folder in ``dtype``, of the text encoder what is ``needed``.

    It is on the CPU; but of a transformer that is ``tensor_parallel`` only this process's share is read, onto its GPU.

    Components are loaded one at a time by their own ``from_pretrained`` and not through the pipeline's: that
    is what lets each be quantized before the next one needs memory.
    """
    library, class_name = component_classes(folder)[name]
    with _quiet(), _refused_as(folder / name):
        cls = getattr(importlib.import_module(library), class_name)
        component: Component
        if name not in MODEL_COMPONENTS:
            component = cls.from_pretrained(str(folder), subfolder=name, local_files_only=True, trust_remote_code=False)
            return component
        arguments = FromPretrained(
            subfolder=name,
            variant=variant_of(folder, name, variant),
            local_files_only=True,
            trust_remote_code=False,
            # Always given: a folder saved in bfloat16 would else mix a bfloat16 text encoder and a float32 transformer.
            dtype=getattr(torch, dtype),
        )
        if name == "text_encoder" and needed is not None:
            return _cut_text_encoder(cls, folder, arguments, needed)
        share = {} if name != "transformer" or tensor_parallel is None else {"parallel_config": tensor_parallel}
        component, report = cls.from_pretrained(str(folder), output_loading_info=True, **arguments, **share)
        _check_complete(folder / name, report["missing_keys"])
        return component


def _cut_text_encoder(
    cls: type[PreTrainedModel], folder: Path, arguments: FromPretrained, needed: NeededLayers
) -> PreTrainedModel:
    """A text encoder without what is never read; tensors of the layers behind are not read from disk either."""
    assert cls.config_class is not None
    subfolder = arguments["subfolder"]
    config = needed.cut(
        cls.config_class.from_pretrained(
            str(folder), subfolder=subfolder, local_files_only=True, trust_remote_code=False
        )
    )
    loaded: Any = cls.from_pretrained(str(folder), config=config, output_loading_info=True, **arguments)
    encoder: PreTrainedModel
    encoder, report = loaded
    read = (key for key in report["missing_keys"] if not key.startswith("lm_head."))
    _check_complete(folder / subfolder, read)
    needed.trim(encoder)
    return encoder


def _check_complete(place: Path, missing: Iterable[str]) -> None:
    """Raise ConfigError for tensors that no file has: the libraries would make some up, or leave them empty."""
    if names := sorted(missing):
        files = ", ".join(sorted(file.name for file in place.glob("*.safetensors"))[:3])
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ConfigError(f"{place} ({files}) lacks the tensor {names[0]}{more}, which its config.json asks for")


@contextmanager
def _refused_as(place: Path) -> Iterator[None]:
    """What a library raises for a component that it cannot load, as a refusal; running out of memory stays itself."""
    try:
        yield
    except (FluxrunError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # they read a stranger's files, and fail in any way they like
        if "can't allocate memory" in str(error):
            raise
        raise ConfigError(f"{place} cannot be loaded: {type(error).__name__}: {python_reason(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No loading bars (``progress`` says what is loaded) and no warnings of the libraries' own.

    They would report every layer that was left out; what is missing is refused.
    """
    switches = (diffusers_logging, transformers_logging)
    shown = [(switch.is_progress_bar_enabled(), switch.get_verbosity()) for switch in switches]
    for switch in switches:
        switch.disable_progress_bar()
        switch.set_verbosity_error()
    try:
        yield
    finally:
        for switch, (bar, level) in zip(switches, shown, strict=True):
            switch.set_verbosity(level)
            if bar:
                switch.enable_progress_bar()


def save_tiny(
    folder: Path,
    pipeline: PipelineKind = "klein",
    *,
    distilled: bool = True,
    dtype: str = "float32",
    shard_bytes: int | None = None,
    variant: str | None = None,
) -> Path:
    """Write the tiny model as an ordinary diffusers checkpoint folder and return ``folder``.

    ``shard_bytes`` splits the weights of each component into files of at most that size.
    """
    model = Flux2Model(
        weights="random", architecture="tiny", pipeline=pipeline, distilled=distilled, text_encoder_layers="all"
    )
    base = load(model, dtype=dtype, device="cpu")
    base.pipeline.save_pretrained(folder, variant=variant, max_shard_size=shard_bytes or "5GB")
    return folder
