"""Where a model's weights are, and whether they are whole: settled before anything heavy is loaded.

Imports neither torch nor diffusers nor transformers, and huggingface_hub only for a hub id, so that a wrong
path, a gated repository or a full disk is answered in one line and at once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fluxrun.architectures import (
    HIDDEN_STATES_READ,
    MODEL_COMPONENTS,
    PIPELINE_CLASSES,
    PipelineKind,
    architecture,
    layers_needed,
)
from fluxrun.errors import ConfigError, FluxrunError, one_line

if TYPE_CHECKING:
    from fluxrun.machine import Machine
    from fluxrun.options.model import Flux2Model

LIBRARIES = ("diffusers", "transformers")
"""Libraries a checkpoint may name its components from: the folder may come from a stranger."""

HUB_TIMEOUT_S = 2.0
"""Seconds until a hub that does not answer counts as unreachable."""

HUB_READ_TIMEOUT_S = 10.0
"""Seconds a hub that was reached may take for a small answer."""

WEIGHT_FILE = re.compile(
    r"^(?:model|diffusion_pytorch_model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.-]+))?(?:-\d+-of-\d+)?\.safetensors$"
)
INDEX_FILE = re.compile(r"^(?:model|diffusion_pytorch_model)\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json$")
TEXT_LAYER = re.compile(r"(?:^|\.)(?:model|language_model)\.layers\.(\d+)\.")
"""A tensor of the language model's layers; a vision tower numbers its own ones."""
TEXT_FILE = re.compile(r"\.(json|txt|model|jinja)$")
VOCABULARIES = ("tokenizer.json", "vocab.json", "tekken.json", "tokenizer.model")


@dataclass(frozen=True)
class Located:
    """Where weights are and what it takes to have them. Sizes in bytes."""

    kind: Literal["folder", "hub", "random"]
    source: str
    """For people and the record: the folder, ``hub ID`` or ``random ARCHITECTURE``."""
    pipeline: PipelineKind
    distilled: bool
    folder: Path | None = None
    """The checkpoint folder; None while it is not (completely) on this disk."""
    id: str | None = None
    revision: str | None = None
    """The resolved commit, for a hub id."""
    asked_revision: str | None = None
    files: tuple[str, ...] = ()
    """What a download fetches: the files diffusers needs and nothing else of the repository."""
    download_bytes: int = 0
    cached_bytes: int = 0
    free_disk_bytes: int = 0
    cache: Path | None = None
    variant: str | None = None
    component_bytes: dict[str, int] = field(default_factory=dict)
    """Weight bytes of each model component: of its files, whose dtype may not be the run's; of ``random``, as built."""

    def announcement(self) -> str | None:
        """What is said before a download starts, or None when there is none."""
        if not self.download_bytes:
            return None
        have = f", {gigabytes(self.cached_bytes)} already there" if self.cached_bytes else ""
        return (
            f"download: {gigabytes(self.download_bytes)} to {self.cache} ({gigabytes(self.free_disk_bytes)} free{have})"
        )


def gigabytes(count: int) -> str:
    """Decimal, as the hub and disk makers count: ``15.8 GB``, ``3.1 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.{0 if count >= 100 * size else 1}f} {unit}"
    return f"{count / 1000:.1f} kB"


def inspect(model: Flux2Model, machine: Machine | None = None) -> Located:
    """Find ``model``'s weights and check that they are whole; for a hub id, what must still be downloaded.

    With a ``machine``, also that it has what the checkpoint's text processor needs. Raises ConfigError.
    """
    if model.weights == "random":
        return _random(model, "bfloat16" if machine is None else model.dtype_on(machine))
    folder = model.folder()
    if folder is not None:
        located = _local(model, folder)
    elif model.id:
        located = _hub(model)
    else:
        raise ConfigError(f"model {model.name or 'option'} names no weights: give model.path=FOLDER or model.id=HUB/ID")
    if machine is not None:
        _check_processor(located, machine)
    return located


def resolve(model: Flux2Model, located: Located) -> Flux2Model:
    """``model`` with what its checkpoint knows filled in: pipeline, distilled, steps and guidance."""
    return model.model_copy(
        update={
            "pipeline": located.pipeline,
            "distilled": located.distilled,
            "steps": model.default_steps(located.distilled),
            "guidance": model.default_guidance(located.distilled),
        }
    )


def _random(model: Flux2Model, dtype: str) -> Located:
    if model.architecture is None:
        raise ConfigError("model.weights=random needs sizes: give model.architecture=dev, klein_4b, klein_9b or tiny")
    sizes = architecture(model.architecture, model.pipeline)
    distilled = sizes.pipeline == "klein" and model.distilled is not False
    found = sizes.bytes_in(dtype)
    if model.text_encoder_layers == "needed":
        each = found["text_encoder"] // sizes.parameters["text_encoder"]
        found["text_encoder"] -= each * sizes.unread_text_parameters(_read_layers(model, sizes.pipeline))
    return Located("random", model.source(), sizes.pipeline, distilled, component_bytes=found)


def _read_layers(model: Flux2Model, pipeline: PipelineKind) -> tuple[int, ...]:
    """The text encoder's hidden states that become the embedding."""
    return model.text_encoder_out_layers or HIDDEN_STATES_READ[pipeline]


# --- a folder -------------------------------------------------------------------------------------


def _local(model: Flux2Model, folder: Path) -> Located:
    if not folder.exists():
        raise ConfigError(f"model.path={folder}: no such folder (a FLUX.2 checkpoint in diffusers layout is expected)")
    _check_whole(folder, model.variant, "copy or download the folder again")
    return _of_folder(model, folder, kind="folder", source=str(folder.resolve()))


def _of_folder(model: Flux2Model, folder: Path, **fields: Any) -> Located:
    pipeline, distilled = _pipeline_of(_model_index(folder), model)
    sizes = {name: sum(f.stat().st_size for f in _weights(folder, name, model.variant)) for name in MODEL_COMPONENTS}
    if model.text_encoder_layers == "needed":
        files = _weights(folder, "text_encoder", model.variant)
        sizes["text_encoder"] -= _unread_bytes(files, _read_layers(model, pipeline))
    return Located(
        pipeline=pipeline,
        distilled=distilled,
        folder=folder,
        variant=model.variant,
        component_bytes=sizes,
        **fields,
    )


def _unread_bytes(files: list[Path], read: tuple[int, ...]) -> int:
    """Bytes in a text encoder's files that are not loaded: layers behind the last one read, and the head."""
    layers: dict[int, int] = {}
    head = 0
    for file in files:
        for name, size in _tensor_sizes(file):
            if match := TEXT_LAYER.search(name):
                layers[int(match[1])] = layers.get(int(match[1]), 0) + size
            elif name.startswith("lm_head.") or ".lm_head." in name:
                head += size
    kept = layers_needed(len(layers), read)
    return head + sum(size for number, size in layers.items() if number >= kept)


def _tensor_sizes(file: Path) -> Iterator[tuple[str, int]]:
    """Names and bytes of the tensors in a safetensors file, from its header (it was checked to be whole)."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, end - start


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return data


def _model_index(folder: Path) -> dict[str, Any]:
    """model_index.json, checked to name a FLUX.2 pipeline whose components' libraries may be imported."""
    file = folder / "model_index.json"
    if not file.is_file():
        single = next(folder.glob("*.safetensors"), None) if folder.is_dir() else folder
        hint = f"; {single.name} alone is a single-file checkpoint, which fluxrun does not read" if single else ""
        raise ConfigError(f"{folder} is not a diffusers folder: it has no model_index.json{hint}")
    index = _read_json(file)
    _check_index(index, str(folder))
    return index


def _check_index(index: dict[str, Any], where: str) -> None:
    name = index.get("_class_name")
    if name not in PIPELINE_CLASSES:
        raise ConfigError(f"{where} holds a {name}, not a FLUX.2 pipeline (allowed: {', '.join(PIPELINE_CLASSES)})")
    components = _components(index)
    missing = [part for part in (*MODEL_COMPONENTS, "tokenizer", "scheduler") if part not in components]
    if missing:
        raise ConfigError(f"{where}: model_index.json does not name the component(s) {', '.join(missing)}")
    foreign = sorted({library for library, _ in components.values()} - set(LIBRARIES))
    if foreign:
        raise ConfigError(f"{where} asks for code from {', '.join(foreign)}; only {' and '.join(LIBRARIES)} are used")


def _components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    }


def component_classes(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class name of each component that model_index.json names."""
    return _components(_model_index(folder))


def _pipeline_of(index: dict[str, Any], model: Flux2Model) -> tuple[PipelineKind, bool]:
    """Pipeline and whether it is distilled: the checkpoint knows; if it does not say, the option does."""
    pipeline = PIPELINE_CLASSES[index["_class_name"]]
    said = index.get("is_distilled", model.distilled)
    return pipeline, pipeline == "klein" and bool(said)


def _check_whole(folder: Path, variant: str | None, remedy: str) -> None:
    """Raise ConfigError naming what ``folder`` lacks."""
    problems = list(_problems(folder, variant))
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ConfigError(f"{folder} is incomplete: {shown} ({remedy})")
    if variant and not any(variant_of(folder, name, variant) for name in MODEL_COMPONENTS):
        found = sorted({v for name in MODEL_COMPONENTS for v in _variants(folder / name) if v})
        others = f"; it has {', '.join(found)}" if found else ""
        raise ConfigError(
            f"{folder} has no {variant} weight files{others} (leave model.variant out for the plain ones)"
        )


def _problems(folder: Path, variant: str | None) -> Iterator[str]:
    for name in _components(_model_index(folder)):
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
    for file in files:
        problem = _file_problem(file)
        if problem:
            yield f"{place.name}/{file.name} {problem}"


def _file_problem(file: Path) -> str | None:
    """Why a safetensors file cannot be whole, from its header alone."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            return "is a Git LFS pointer, not the weights (git lfs pull)"
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            return f"is truncated ({size:,} bytes)"
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return "is not a safetensors file"
    expected = 8 + length + max(ends, default=0)
    return f"is truncated ({size:,} of {expected:,} bytes)" if size < expected else None


def _variants(place: Path) -> set[str | None]:
    """Variants that a component folder has weights of; None stands for the plain ones."""
    return {match["variant"] for file in place.glob("*.safetensors") if (match := WEIGHT_FILE.match(file.name))}


def variant_of(folder: Path, component: str, variant: str | None) -> str | None:
    """``variant`` if ``component`` has weights of it, else None: like in diffusers, plain ones serve then."""
    return variant if variant and variant in _variants(folder / component) else None


def _weights(folder: Path, component: str, variant: str | None) -> list[Path]:
    """The weight files that will be read; from the shard index where there is one, so some may be missing."""
    place = folder / component
    used = variant_of(folder, component, variant)
    whole = place / f"model{'.' + used if used else ''}.safetensors"
    if whole.is_file():  # transformers prefers it to shards, diffusers (whose files are named otherwise) the shards
        return [whole]
    for index in place.glob("*.safetensors.index*.json"):
        match = INDEX_FILE.match(index.name)
        if match and match["variant"] == used:
            shards = _read_json(index).get("weight_map", {})
            return [place / name for name in sorted(set(shards.values()))]
    return [
        file
        for file in sorted(place.glob("*.safetensors"))
        if (match := WEIGHT_FILE.match(file.name)) and match["variant"] == used
    ]


def _check_processor(located: Located, machine: Machine) -> None:
    """The dev checkpoint's image-and-text processor needs torchvision; a plain tokenizer does not."""
    if located.folder is None:
        return
    _, class_name = component_classes(located.folder)["tokenizer"]
    if class_name in ("PixtralProcessor", "AutoProcessor") and machine.lacks("torchvision"):
        raise ConfigError(f"{class_name} of {located.source} needs torchvision (pip install 'fluxrun[dev]')")


# --- the hub --------------------------------------------------------------------------------------


def free_disk(path: Path) -> int:
    """Free bytes on the disk that holds ``path``, which need not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _hub(model: Flux2Model) -> Located:
    """A hub id: from the cache, without asking the hub, when it is whole there; else what a download takes."""
    from huggingface_hub import constants

    cached = _cached_folder(model)
    problems = _cache_problems(cached, model.variant)
    cache = Path(constants.HF_HUB_CACHE)
    if cached and not problems:
        located = _of_folder(model, cached, kind="hub", source=f"hub {model.id}")
        return replace(
            located,
            id=model.id,
            revision=cached.name,
            asked_revision=model.revision,
            cache=cache,
            cached_bytes=sum(located.component_bytes.values()),
            free_disk_bytes=free_disk(cache),
        )
    if model.offline or constants.HF_HUB_OFFLINE:
        why = "model.offline=true" if model.offline else "HF_HUB_OFFLINE is set"
        state = f"not complete in {cache}: {problems[0]}" if cached else f"not in {cache}"
        raise ConfigError(f"{model.id} is {state}, and {why}; run once online, or give model.path=FOLDER")
    return _remote(model, cache)


def _cached_folder(model: Flux2Model) -> Path | None:
    """The snapshot of the model's revision in the hub's cache, whole or not, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    assert model.id is not None
    try:
        file = try_to_load_from_cache(model.id, "model_index.json", revision=model.revision)
    except HFValidationError as error:
        raise ConfigError(f"model.id={model.id}: not a hub id (expected OWNER/NAME): {one_line(error)}") from error
    return Path(file).parent if isinstance(file, str) else None


def _cache_problems(folder: Path | None, variant: str | None) -> list[str]:
    if folder is None:
        return ["nothing"]
    problems = list(_problems(folder, variant))
    if not problems and variant and not any(variant_of(folder, name, variant) for name in MODEL_COMPONENTS):
        problems.append(f"no {variant} weight files")
    return problems


def _remote(model: Flux2Model, cache: Path) -> Located:
    assert model.id is not None
    info, index = _ask_hub(model)
    _check_index(index, model.id)
    pipeline, distilled = _pipeline_of(index, model)
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
    files = wanted_files(list(sizes), list(_components(index)), model.variant)
    _check_listing(files, model)
    have = [name for name in files if _is_cached(model.id, name, info.sha)]
    total, cached = sum(sizes[name] for name in files), sum(sizes[name] for name in have)
    weights = {name: sum(sizes[f] for f in files if f.startswith(f"{name}/")) for name in MODEL_COMPONENTS}
    located = Located(
        kind="hub",
        source=f"hub {model.id}",
        pipeline=pipeline,
        distilled=distilled,
        id=model.id,
        revision=info.sha,
        asked_revision=model.revision,
        files=tuple(files),
        download_bytes=total - cached,
        cached_bytes=cached,
        free_disk_bytes=free_disk(cache),
        cache=cache,
        variant=model.variant,
        component_bytes=weights,
    )
    if located.download_bytes > located.free_disk_bytes:
        raise ConfigError(
            f"{model.id} needs {gigabytes(located.download_bytes)}, {cache} has"
            f" {gigabytes(located.free_disk_bytes)} free; make room, or set HF_HOME to another disk"
        )
    return located


def _ask_hub(model: Flux2Model) -> tuple[Any, dict[str, Any]]:
    """The repository's file list and its model_index.json, which also shows whether access is granted."""
    from huggingface_hub import HfApi, hf_hub_download

    assert model.id is not None
    try:
        _reach(HfApi().endpoint)
        info = HfApi().model_info(model.id, revision=model.revision, files_metadata=True, timeout=HUB_READ_TIMEOUT_S)
        names = [entry.rfilename for entry in info.siblings or []]
        if "model_index.json" not in names:
            raise ConfigError(f"{model.id} on the hub is not a diffusers repository: it has no model_index.json")
        with _no_bars():
            file = hf_hub_download(
                model.id, "model_index.json", revision=model.revision, etag_timeout=HUB_READ_TIMEOUT_S
            )
    except Exception as error:
        # The client's exceptions share no base class, and its HTTP library's differ between its versions.
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "huggingface_hub")):
            raise
        raise _explained(error, model) from error
    return info, _read_json(Path(file))


@contextmanager
def _no_bars() -> Iterator[None]:
    """Switch the hub client's progress bars off: a file of 500 bytes needs none."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            enable_progress_bars()


def _reach(endpoint: str) -> None:
    """Connect to the hub once, with a short limit: its client would retry for a long time.

    Skipped behind a proxy, which is then the only thing that could be reached. Raises OSError.
    """
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    url = urlsplit(endpoint)
    host = url.hostname or ""
    if getproxies() and not proxy_bypass(host):
        return
    socket.create_connection((host, url.port or (80 if url.scheme == "http" else 443)), timeout=HUB_TIMEOUT_S).close()


def _explained(error: Exception, model: Flux2Model) -> ConfigError:
    """What a hub error means and what to do about it."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    page = f"https://huggingface.co/{model.id}"
    licence = f"accept the licence at {page}, then log in: hf auth login"
    if isinstance(error, errors.GatedRepoError):
        return ConfigError(f"{model.id} is gated: {licence}")
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"model.revision={model.revision}: {model.id} has no such branch, tag or commit")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ConfigError(f"{model.id} was not found on the hub; if it is private, log in: hf auth login")
    if status in (401, 403):
        return ConfigError(f"{model.id}: the hub refused access ({status}): {licence}")
    if isinstance(error, errors.HfHubHTTPError) and status is not None:
        return ConfigError(f"{model.id}: the hub answered with an error {status}; try again later")
    offline = "use model.path=FOLDER, or model.offline=true when it is in the cache"
    return ConfigError(f"{model.id}: the hub cannot be reached ({one_line(error, 120)}); {offline}")


def wanted_files(names: list[str], components: list[str], variant: str | None) -> list[str]:
    """The files of a repository that its diffusers pipeline reads, among ``names``.

    Left out: single-file duplicates at the root, other variants, other formats, pictures.
    """
    chosen = [name for name in names if name == "model_index.json"]
    for component in components:
        inside = [name for name in names if name.startswith(f"{component}/")]
        matches = {name: WEIGHT_FILE.match(name.rpartition("/")[2]) for name in inside}
        present = {match["variant"] for match in matches.values() if match}
        used = variant if variant in present else None
        for name in inside:
            match = matches[name] or INDEX_FILE.match(name.rpartition("/")[2])
            if match["variant"] == used if match else TEXT_FILE.search(name):
                chosen.append(name)
    return chosen


def _check_listing(files: list[str], model: Flux2Model) -> None:
    weights = [name for name in files if name.endswith(".safetensors")]
    for component in MODEL_COMPONENTS:
        if not any(name.startswith(f"{component}/") for name in weights):
            raise ConfigError(f"{model.id} on the hub has no .safetensors weights in {component}/")
    if model.variant and not any(f".{model.variant}" in name for name in weights):
        raise ConfigError(f"{model.id} on the hub has no {model.variant} weight files (leave model.variant out)")


def _is_cached(repo: str, name: str, commit: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, name, revision=commit), str)


def download(located: Located, progress: Callable[[str], None] | None = None) -> Path:
    """The checkpoint folder of ``located``, fetched first if it must be; finished files are never fetched twice.

    ``progress`` gets the announcement and then a line about once a second. Raises FluxrunError when the
    download breaks off; the next one goes on from there.
    """
    if located.folder is not None:
        return located.folder
    arrived = _arrived(located)
    if arrived is not None:  # since ``located`` was made, by an earlier job of the same sweep for example
        return arrived
    say = progress or (lambda line: None)
    say(located.announcement() or f"fetching {located.id}")
    folder = _fetch(located, say)
    _check_whole(folder, located.variant, "delete it from the cache and run again")
    return folder


def _arrived(located: Located) -> Path | None:
    """The snapshot folder, if every file of ``located`` is in the cache by now."""
    from huggingface_hub import try_to_load_from_cache

    assert located.id is not None
    files = [try_to_load_from_cache(located.id, name, revision=located.revision) for name in located.files]
    if not all(isinstance(file, str) for file in files):
        return None
    return Path(str(files[located.files.index("model_index.json")])).parent


# Run in a child process: the hub client's worker threads finish whole files, gigabytes of them, before they let
# an interrupt through; a child can be ended at once. It ends by itself when its standard input does, that is when
# the parent is gone.
_CHILD = """
import json, os, sys, threading
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
from huggingface_hub import snapshot_download
try:
    print(snapshot_download(**json.loads(sys.argv[1])), flush=True)
    os._exit(0)
except Exception as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    print(type(error).__name__ + ": " + " ".join(lines)[:300], file=sys.stderr, flush=True)
    os._exit(1)
"""


def _fetch(located: Located, say: Callable[[str], None], every_s: float = 1.0) -> Path:
    """Download ``located.files`` into the hub's cache and return the snapshot folder."""
    from huggingface_hub import HfApi

    assert located.id is not None
    assert located.cache is not None
    arguments = {
        "repo_id": located.id,
        "revision": located.asked_revision,
        "allow_patterns": located.files,
        "cache_dir": str(located.cache),
        "endpoint": HfApi().endpoint,
    }
    blobs = located.cache / f"models--{located.id.replace('/', '--')}" / "blobs"
    partial, before = set(blobs.glob("*.incomplete")), _folder_bytes(blobs)
    read_end, write_end = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(arguments)],
        stdin=read_end,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    try:
        while True:
            try:
                answer, complaint = child.communicate(timeout=every_s)
                break
            except subprocess.TimeoutExpired:
                # Measured in the cache, not by the client's counters: those differ between its versions.
                arrived = min(max(_folder_bytes(blobs) - before, 0), located.download_bytes)
                say(f"downloaded {gigabytes(arrived)} of {gigabytes(located.download_bytes)}")
    finally:
        child.kill()
        child.wait()
        os.close(read_end)
        os.close(write_end)
        for leftover in set(blobs.glob("*.*.incomplete")) - partial:  # named for the child, of no use to another
            leftover.unlink(missing_ok=True)
    if child.returncode != 0:
        why = one_line(RuntimeError(complaint.strip().rpartition("\n")[2] or f"exit code {child.returncode}"), 200)
        raise FluxrunError(f"the download of {located.id} broke off ({why}); run again to go on from there")
    return Path(answer.strip().rpartition("\n")[2])


def _folder_bytes(folder: Path) -> int:
    total = 0
    for file in folder.glob("*"):
        with suppress(OSError):  # a finished file is renamed between listing and asking
            total += file.stat().st_size
    return total
