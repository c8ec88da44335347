"""Finds a model's weights: a folder, a hub id, or random ones of a known architecture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fluxrun.architectures import ArchitectureName, PipelineKind, architecture, family, recognised
from fluxrun.errors import ConfigError
from fluxrun.hardware.machine import Machine
from fluxrun.options.model import Flux2Model
from fluxrun.quantization.declared import PACKAGES
from fluxrun.weights.folder import check_whole, component_classes, of_folder, read_json, read_layers
from fluxrun.weights.hub import locate
from fluxrun.weights.location import Located


def find_weights(model: Flux2Model, machine: Machine | None = None) -> Located:
    """Find ``model``'s weights and check that they are whole; for a hub id, what must still be downloaded.

    With a ``machine``, also that it has what the checkpoint's text processor needs. Raises ConfigError.
    """
    if model.weights == "random":
        return _random(model, "bfloat16" if machine is None else model.dtype_on(machine))
    folder = model.folder()
    if folder is not None:
        located = _local(model, folder)
    elif model.id:
        located = locate(model)
    else:
        raise ConfigError(f"model {model.name or 'option'} names no weights: give model.path=FOLDER or model.id=HUB/ID")
    _check_libraries(located, machine)
    return located


def resolve(model: Flux2Model, located: Located) -> Flux2Model:
    """``model`` with what its checkpoint knows filled in: pipeline, architecture, distilled, steps and guidance."""
    return model.model_copy(
        update={
            "architecture": model.architecture or _architecture_of(located),
            "pipeline": _pipeline_for(model, located),
            "distilled": located.distilled,
            "steps": model.default_steps(located.distilled),
            "guidance": model.default_guidance(located.distilled),
        }
    )


def _pipeline_for(model: Flux2Model, located: Located) -> PipelineKind:
    """The checkpoint's pipeline, or the one of its family that was asked for to edit with. Raises ConfigError."""
    if model.pipeline not in ("klein_inpaint", "klein_kv"):
        return located.pipeline
    if family(located.pipeline) == "dev":
        raise ConfigError(
            f"model.pipeline={model.pipeline}: {located.source} is a dev model, only klein models have it"
        )
    return model.pipeline


def _architecture_of(located: Located) -> ArchitectureName | None:
    """The architecture of a folder of a user's own, where it is one of those known: a fine-tune has its sizes."""
    config = _transformer_config(located)
    return recognised(config) if config else None


def attention_heads(located: Located) -> int | None:
    """The transformer's attention heads, as its config says; None while there is none on this disk."""
    heads = _transformer_config(located).get("num_attention_heads")
    return heads if isinstance(heads, int) else None


def _transformer_config(located: Located) -> dict[str, Any]:
    file = None if located.folder is None else located.folder / "transformer" / "config.json"
    return read_json(file) if file is not None and file.is_file() else {}


def _random(model: Flux2Model, dtype: str) -> Located:
    if model.architecture is None:
        raise ConfigError("model.weights=random needs sizes: give model.architecture=dev, klein_4b, klein_9b or tiny")
    sizes = architecture(model.architecture, model.pipeline)
    distilled = sizes.pipeline == "klein" and model.distilled is not False
    found = sizes.bytes_in(dtype)
    if model.text_encoder_layers == "needed":
        each = found["text_encoder"] // sizes.parameters["text_encoder"]
        found["text_encoder"] -= each * sizes.unread_text_parameters(read_layers(model, sizes.pipeline))
    return Located("random", model.source(), sizes.pipeline, distilled, component_bytes=found)


def check_layers(model: Flux2Model, located: Located) -> None:
    """Refuse hidden states that a checkpoint's text encoder does not have, before anything is loaded."""
    if located.folder is None:
        return
    config = read_json(located.folder / "text_encoder" / "config.json")
    own = config.get("text_config")
    layers = config.get("num_hidden_layers") or (own.get("num_hidden_layers") if isinstance(own, dict) else None)
    last = max(read_layers(model, located.pipeline))
    if layers is not None and last > layers:
        raise ConfigError(
            f"the text encoder of {located.source} has {layers} layers, hidden state {last} would be read: "
            f"give model.text_encoder_out_layers=[…] with numbers up to {layers}"
        )


def _local(model: Flux2Model, folder: Path) -> Located:
    if not os.path.exists(folder):
        raise ConfigError(f"model.path={folder}: no such folder (a FLUX.2 checkpoint in diffusers layout is expected)")
    check_whole(folder, model.variant, "copy or download the folder again")
    return of_folder(model, folder, kind="folder", source=str(folder.resolve()))


def _check_libraries(located: Located, machine: Machine | None) -> None:
    """Refuse a checkpoint that needs a library which is not there: nothing else can take that one's place."""
    for component, declared in located.declared.items():
        text = f"the {component} of {located.source} is quantized with {declared.method}"
        if declared.package is None:
            raise ConfigError(f"{text}, which fluxrun does not load (it loads {', '.join(PACKAGES)})")
        if machine is not None and (reason := machine.lacks(declared.package)):
            raise ConfigError(f"{text}: {reason}")
    if machine is not None:
        _check_processor(located, machine)


def needs_torchvision(located: Located) -> bool:
    """Whether texts go through dev's image-and-text processor, which imports torchvision; a tokenizer does not."""
    if located.folder is None:
        return located.kind != "random" and located.pipeline == "dev"
    return component_classes(located.folder)["tokenizer"][1] in ("PixtralProcessor", "AutoProcessor")


def _check_processor(located: Located, machine: Machine) -> None:
    if located.folder is not None and needs_torchvision(located) and machine.lacks("torchvision"):
        raise ConfigError(f"the text processor of {located.source} needs torchvision (pip install 'fluxrun[dev]')")
