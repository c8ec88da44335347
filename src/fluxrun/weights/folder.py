"""Where a model's weights are, and whether they are whole: settled before anything heavy is loaded.

Imports neither torch nor diffusers nor transformers, and huggingface_hub only for a hub id, so that a wrong
path, a gated repository or a full disk is answered in one line and at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fluxrun.architectures import (
    HIDDEN_STATES_READ,
    MODEL_COMPONENTS,
    PIPELINE_CLASSES,
    PipelineKind,
    family,
    layers_needed,
)
from fluxrun.errors import ConfigError
from fluxrun.formatting import shorten
from fluxrun.options.model import Flux2Model
from fluxrun.quantization.declared import Declared, declared_by
from fluxrun.reading import Unreadable, parse_json, read_text
from fluxrun.types import Json
from fluxrun.weights.headers import Tensor, missing_tensors, read_header
from fluxrun.weights.location import Kind, Located
from fluxrun.weights.sanity import check_config, check_files, check_scheduler

LIBRARIES = ("diffusers", "transformers")
"""Libraries a checkpoint may name its components from: the folder may come from a stranger."""

WEIGHT_FILE = re.compile(
    r"^(?:model|diffusion_pytorch_model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.-]+))?(?:-\d+-of-\d+)?\.safetensors$"
)

INDEX_FILE = re.compile(r"^(?:model|diffusion_pytorch_model)\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json$")

TEXT_LAYER = re.compile(r"(?:^|\.)(?:model|language_model)\.layers\.(\d+)\.")
"""A tensor of the language model's layers; a vision tower numbers its own ones."""

VOCABULARIES = ("tokenizer.json", "vocab.json", "tekken.json", "tokenizer.model")


def read_layers(model: Flux2Model, pipeline: PipelineKind) -> tuple[int, ...]:
    """The text encoder's hidden states that become the embedding."""
    return model.text_encoder_out_layers or HIDDEN_STATES_READ[family(pipeline)]


def of_folder(model: Flux2Model, folder: Path, *, kind: Kind, source: str) -> Located:
    pipeline, distilled = pipeline_of(_model_index(folder), model)
    check_sizes(folder, model.variant)
    files = {name: _weights(folder, name, model.variant) for name in MODEL_COMPONENTS}
    sizes = {name: sum(file.stat().st_size for file in found) for name, found in files.items()}
    if model.text_encoder_layers == "needed":
        sizes["text_encoder"] -= _unread_bytes(files["text_encoder"], read_layers(model, pipeline))
    return Located(
        kind=kind,
        source=source,
        pipeline=pipeline,
        distilled=distilled,
        folder=folder,
        variant=model.variant,
        component_bytes=sizes,
        weight_files=tuple(file for found in files.values() for file in found),
        declared=declared_in(folder),
    )


def declared_in(folder: Path) -> dict[str, Declared]:
    """The quantization that components declare in their config.json, by component."""
    found = {name: declared_by(read_json(folder / name / "config.json")) for name in MODEL_COMPONENTS}
    return {name: declared for name, declared in found.items() if declared}


def _unread_bytes(files: list[Path], read: tuple[int, ...]) -> int:
    """Bytes in a text encoder's files that are not loaded: layers behind the last one read, and the head."""
    layers: dict[int, int] = {}
    head = 0
    for name, tensor in _tensors_of(files).items():
        if match := TEXT_LAYER.search(name):
            layers[int(match[1])] = layers.get(int(match[1]), 0) + tensor.bytes
        elif name.startswith("lm_head.") or ".lm_head." in name:
            head += tensor.bytes
    kept = layers_needed(len(layers), read)
    return head + sum(size for number, size in layers.items() if number >= kept)


def _tensors_of(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of a component's files, from their headers."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= read_header(file)
        except Unreadable as error:
            raise ConfigError(f"{file} {error}") from error
    return tensors


def check_sizes(folder: Path, variant: str | None) -> None:
    """Refuse configs that ask for other sizes than the weights have, before a library builds them."""
    for name in MODEL_COMPONENTS:
        file = folder / name / "config.json"
        check_config(file, read_json(file), _tensors_of(_weights(folder, name, variant)))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    check_scheduler(scheduler, read_json(scheduler))


def read_json(file: Path) -> dict[str, Any]:
    try:
        data = parse_json(read_text(file))
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such file") from error
    except Unreadable as error:
        raise ConfigError(f"{file} {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return data


def _model_index(folder: Path) -> dict[str, Any]:
    """model_index.json, checked to name a FLUX.2 pipeline whose components' libraries may be imported."""
    file = folder / "model_index.json"
    if folder.is_dir():
        check_files(folder)
    if not file.is_file():
        single = next(folder.glob("*.safetensors"), None) if folder.is_dir() else folder
        hint = f"; {single.name} alone is a single-file checkpoint, which fluxrun does not read" if single else ""
        raise ConfigError(f"{folder} is not a diffusers folder: it has no model_index.json{hint}")
    index = read_json(file)
    check_index(index, str(folder))
    return index


def check_index(index: Mapping[str, Json], where: str) -> None:
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINE_CLASSES:
        raise ConfigError(
            f"{where} holds a {shorten(name)}, not a FLUX.2 pipeline (allowed: {', '.join(PIPELINE_CLASSES)})"
        )
    components = components_of(index)
    missing = [part for part in (*MODEL_COMPONENTS, "tokenizer", "scheduler") if part not in components]
    if missing:
        raise ConfigError(f"{where}: model_index.json does not name the component(s) {', '.join(missing)}")
    foreign = sorted({library for library, _ in components.values()} - set(LIBRARIES))
    if foreign:
        raise ConfigError(f"{where} asks for code from {', '.join(foreign)}; only {' and '.join(LIBRARIES)} are used")


def components_of(index: Mapping[str, Json]) -> dict[str, tuple[str, str]]:
    """Library and class name of each component."""
    components = {}
    for name, value in index.items():
        match value:
            case [str(library), str(class_name)]:
                components[name] = (library, class_name)
    return components


def component_classes(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class name of each component that model_index.json names."""
    return components_of(_model_index(folder))


def pipeline_of(index: Mapping[str, Json], model: Flux2Model) -> tuple[PipelineKind, bool]:
    """Pipeline and whether it is distilled: the checkpoint knows; if it does not say, the option does."""
    pipeline = PIPELINE_CLASSES[str(index["_class_name"])]
    # Only few-step weights are made for the KV pipeline, whose config does not say.
    unsaid = pipeline == "klein_kv" if model.distilled is None else model.distilled
    return pipeline, pipeline != "dev" and bool(index.get("is_distilled", unsaid))


def check_whole(folder: Path, variant: str | None, remedy: str) -> None:
    """Raise ConfigError naming what ``folder`` lacks."""
    problems = list(problems_of(folder, variant))
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ConfigError(f"{folder} is incomplete: {shown} ({remedy})")
    if variant and not any(variant_of(folder, name, variant) for name in MODEL_COMPONENTS):
        found = sorted({v for name in MODEL_COMPONENTS for v in _variants(folder / name) if v})
        others = f"; it has {', '.join(found)}" if found else ""
        raise ConfigError(
            f"{folder} has no {variant} weight files{others} (leave model.variant out for the plain ones)"
        )


def problems_of(folder: Path, variant: str | None) -> Iterator[str]:
    for name in components_of(_model_index(folder)):
        place = folder / name
        if not place.is_dir():
            yield f"folder {name}/ is missing"
        elif name in MODEL_COMPONENTS:
            yield from _model_problems(place, variant)
        elif name == "scheduler" and not (place / "scheduler_config.json").is_file():
            yield f"{name}/scheduler_config.json is missing"
        elif name == "tokenizer" and not any((place / file).is_file() for file in VOCABULARIES):
            yield f"{name}/tokenizer.json is missing"


def _model_problems(place: Path, variant: str | None) -> Iterator[str]:
    if not (place / "config.json").is_file():
        yield f"{place.name}/config.json is missing"
    files = _weights(place.parent, place.name, variant)
    if not files:
        only = ", ".join(sorted(v for v in _variants(place) if v))
        hint = f" (only the variant(s) {only}: give model.variant)" if only else ""
        yield f"{place.name}/ has no .safetensors weights{hint}"
    problems = {file: problem for file in files if (problem := _file_problem(file))}
    yield from (f"{place.name}/{file.name} {problem}" for file, problem in problems.items())
    if not problems and (index := _index(place, variant_of(place.parent, place.name, variant))):
        headers = {file.name: read_header(file) for file in files}
        for name, tensor in missing_tensors(weight_map(index), headers):
            yield f"{place.name}/{name} lacks the tensor {tensor}"


def _file_problem(file: Path) -> str | None:
    """Why a safetensors file cannot be whole, from its header alone."""
    if not file.is_file():
        return "is missing"
    try:
        read_header(file)
    except Unreadable as error:
        return str(error)
    return None


def _variants(place: Path) -> set[str | None]:
    """Variants that a component folder has weights of; None stands for the plain ones."""
    return {match["variant"] for file in place.glob("*.safetensors") if (match := WEIGHT_FILE.match(file.name))}


def variant_of(folder: Path, component: str, variant: str | None) -> str | None:
    """``variant`` if ``component`` has weights of it, else None: like in diffusers, plain ones serve then."""
    return variant if variant and variant in _variants(folder / component) else None


def weight_map(index: Path) -> dict[str, str]:
    """Which file has each tensor, by a shard index. Raises ConfigError: the names are joined to the folder's path."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in found.values()
    ):
        raise ConfigError(f"{index}: weight_map must name a file beside it for each tensor")
    return found


def _weights(folder: Path, component: str, variant: str | None) -> list[Path]:
    """The weight files that will be read; from the shard index where there is one, so some may be missing."""
    place = folder / component
    used = variant_of(folder, component, variant)
    whole = place / f"model{'.' + used if used else ''}.safetensors"
    if whole.is_file():  # transformers prefers it to shards, diffusers (whose files are named otherwise) the shards
        return [whole]
    if index := _index(place, used):
        return [place / name for name in sorted(set(weight_map(index).values()))]
    return [
        file
        for file in sorted(place.glob("*.safetensors"))
        if (match := WEIGHT_FILE.match(file.name)) and match["variant"] == used
    ]


def _index(place: Path, variant: str | None) -> Path | None:
    """The shard index of a component's weights, unless they are one file that the library prefers."""
    if (place / f"model{'.' + variant if variant else ''}.safetensors").is_file():
        return None
    indices = ((index, INDEX_FILE.match(index.name)) for index in sorted(place.glob("*.safetensors.index*.json")))
    return next((index for index, match in indices if match and match["variant"] == variant), None)
