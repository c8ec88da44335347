"""A model on the Hugging Face hub: what it takes to have it, and the errors in one line.

Light like ``folder.py``; huggingface_hub is imported inside functions, because only a hub id needs it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxrun.architectures import MODEL_COMPONENTS
from fluxrun.errors import ConfigError, one_line
from fluxrun.formatting import gigabytes, nearest
from fluxrun.options.model import Flux2Model
from fluxrun.quantization.declared import Declared, declared_by
from fluxrun.weights.folder import (
    INDEX_FILE,
    WEIGHT_FILE,
    check_index,
    components_of,
    of_folder,
    pipeline_of,
    problems_of,
    read_json,
    variant_of,
)
from fluxrun.weights.location import Located

HUB_TIMEOUT_S = 2.0
"""Seconds until a hub that does not answer counts as unreachable."""

HUB_READ_TIMEOUT_S = 10.0
"""Seconds a hub that was reached may take for a small answer."""

MODEL_OTHERWISE = "use model.path=FOLDER, or model.offline=true when it is in the cache"

TEXT_FILE = re.compile(r"\.(json|txt|model|jinja)$")


def free_disk(path: Path) -> int:
    """Free bytes on the disk that holds ``path``, which need not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def locate(model: Flux2Model) -> Located:
    """A hub id: from the cache, without asking the hub, when it is whole there; else what a download takes."""
    from huggingface_hub import constants

    cached = _cached_folder(model)
    problems = _cache_problems(cached, model.variant)
    cache = Path(constants.HF_HUB_CACHE)
    if cached and not problems:
        located = of_folder(model, cached, kind="hub", source=f"hub {model.id}")
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
    problems = list(problems_of(folder, variant))
    if not problems and variant and not any(variant_of(folder, name, variant) for name in MODEL_COMPONENTS):
        problems.append(f"no {variant} weight files")
    return problems


def _remote(model: Flux2Model, cache: Path) -> Located:
    assert model.id is not None
    info, index = _ask_hub(model)
    check_index(index, model.id)
    pipeline, distilled = pipeline_of(index, model)
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
    files = wanted_files(list(sizes), list(components_of(index)), model.variant)
    _check_listing(files, model)
    have = [name for name in files if _is_cached(model.id, name, info.sha)]
    total, cached = sum(sizes[name] for name in files), sum(sizes[name] for name in have)
    weights = {name: sum(sizes[f] for f in files if f.startswith(f"{name}/")) for name in MODEL_COMPONENTS}
    located = Located(
        kind="hub",
        source=f"hub {model.id}",
        declared=_declared_on_hub(model, info.sha, files),
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


def _declared_on_hub(model: Flux2Model, commit: str, files: list[str]) -> dict[str, Declared]:
    """What the components' config.json says of their quantization: small files, fetched before anything else is."""
    wanted = {name: f"{name}/config.json" for name in MODEL_COMPONENTS if f"{name}/config.json" in files}
    found = {name: declared_by(_small_file(model, file, commit)) for name, file in wanted.items()}
    return {name: declared for name, declared in found.items() if declared}


def _small_file(model: Flux2Model, name: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    assert model.id is not None
    with _hub_bars_off(), _explaining(model.id, model.revision, MODEL_OTHERWISE):
        return read_json(Path(hf_hub_download(model.id, name, revision=revision, etag_timeout=HUB_READ_TIMEOUT_S)))


@contextmanager
def _explaining(repo: str, revision: str | None, otherwise: str) -> Iterator[None]:
    """What the hub's client raises, as one line."""
    try:
        yield
    except Exception as error:
        if not _is_the_hubs(error):
            raise
        raise _explained(error, repo, revision, otherwise) from error


def _ask_hub(model: Flux2Model) -> tuple[Any, dict[str, Any]]:
    """The repository's file list and its model_index.json, which also shows whether access is granted."""
    from huggingface_hub import HfApi

    assert model.id is not None
    with _explaining(model.id, model.revision, MODEL_OTHERWISE):
        _reach(HfApi().endpoint)
        info = HfApi().model_info(model.id, revision=model.revision, files_metadata=True, timeout=HUB_READ_TIMEOUT_S)
    if "model_index.json" not in [entry.rfilename for entry in info.siblings or []]:
        raise ConfigError(f"{model.id} on the hub is not a diffusers repository: it has no model_index.json")
    return info, _small_file(model, "model_index.json", model.revision)


def locate_file(repo: str, choose: Callable[[list[str]], str], name: str | None, most: int) -> Located:
    """One file of a repository that need be no model: as it lies in the cache, else what its download takes.

    ``choose`` picks it from the repository's file names where ``name`` is not given. Raises ConfigError.
    """
    from huggingface_hub import HfApi, constants

    cache = Path(constants.HF_HUB_CACHE)
    found = Located("hub", f"hub {repo}", "klein", True, id=repo, cache=cache, free_disk_bytes=free_disk(cache))
    if name is not None and (file := cached_file(repo, name)) is not None:
        return replace(found, files=(name,), folder=file.parents[len(Path(name).parts) - 1])
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{repo}: {name or 'its file list'} is not in {cache}, and HF_HUB_OFFLINE is set")
    with _explaining(repo, None, "give a path, or run again once it can be"):
        _reach(HfApi().endpoint)
        info = HfApi().model_info(repo, files_metadata=True, timeout=HUB_READ_TIMEOUT_S)
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
    name = choose(list(sizes)) if name is None else name
    if name not in sizes:
        raise ConfigError(f"{repo} on the hub has no {name}: {nearest(name, sorted(sizes)[:20])}")
    if sizes[name] > most:
        raise ConfigError(f"{repo}: {name} has {gigabytes(sizes[name])}, at most {gigabytes(most)} are read")
    if sizes[name] > found.free_disk_bytes:
        free = gigabytes(found.free_disk_bytes)
        raise ConfigError(f"{repo}: {name} needs {gigabytes(sizes[name])}, {cache} has {free} free")
    if (file := cached_file(repo, name)) is not None:
        return replace(found, files=(name,), folder=file.parents[len(Path(name).parts) - 1])
    return replace(found, files=(name,), revision=info.sha, download_bytes=sizes[name])


def cached_file(repo: str, name: str) -> Path | None:
    """A file of a repository, if the cache has it. Raises ConfigError for what is no hub id."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(repo, name)
    except HFValidationError as error:
        raise ConfigError(f"{repo}: neither a file or folder nor a hub id (OWNER/NAME)") from error
    return Path(file) if isinstance(file, str) else None


@contextmanager
def _hub_bars_off() -> Iterator[None]:
    """Switch the hub client's progress bars off: a file of 500 bytes needs none."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not in its __all__
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

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


def _is_the_hubs(error: Exception) -> bool:
    """Whether the hub's client raised it: its exceptions share no base class, its HTTP library's change."""
    return isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "huggingface_hub"))


def _explained(error: Exception, repo: str, revision: str | None, otherwise: str) -> ConfigError:
    """What a hub error means and what to do about it; ``otherwise``: without a hub."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    page = f"https://huggingface.co/{repo}"
    licence = f"accept the licence at {page}, then log in: hf auth login"
    if isinstance(error, errors.GatedRepoError):
        return ConfigError(f"{repo} is gated: {licence}")
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"model.revision={revision}: {repo} has no such branch, tag or commit")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ConfigError(f"{repo} was not found on the hub; if it is private, log in: hf auth login")
    if status in (401, 403):
        return ConfigError(f"{repo}: the hub refused access ({status}): {licence}")
    if isinstance(error, errors.HfHubHTTPError) and status is not None:
        return ConfigError(f"{repo}: the hub answered with an error {status}; try again later")
    return ConfigError(f"{repo}: the hub cannot be reached ({one_line(error, 120)}); {otherwise}")


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
