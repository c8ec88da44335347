"""A model on the Hugging Face hub: what it takes to have it, the errors in one line, and a download that resumes.

Light like ``checkpoint.py``; huggingface_hub is imported inside functions, because only a hub id needs it.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxrun.architectures import MODEL_COMPONENTS
from fluxrun.errors import ConfigError, FluxrunError, one_line
from fluxrun.formatting import gigabytes
from fluxrun.options.model import Flux2Model
from fluxrun.quantization.declared import Declared, declared_by
from fluxrun.weights.folder import (
    INDEX_FILE,
    WEIGHT_FILE,
    check_index,
    check_sizes,
    check_whole,
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
    with _hub_bars_off(), _explaining(model):
        return read_json(Path(hf_hub_download(model.id, name, revision=revision, etag_timeout=HUB_READ_TIMEOUT_S)))


@contextmanager
def _explaining(model: Flux2Model) -> Iterator[None]:
    """What the hub's client raises, as one line."""
    try:
        yield
    except Exception as error:
        # The client's exceptions share no base class, and its HTTP library's differ between its versions.
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "huggingface_hub")):
            raise
        raise _explained(error, model) from error


def _ask_hub(model: Flux2Model) -> tuple[Any, dict[str, Any]]:
    """The repository's file list and its model_index.json, which also shows whether access is granted."""
    from huggingface_hub import HfApi

    assert model.id is not None
    with _explaining(model):
        _reach(HfApi().endpoint)
        info = HfApi().model_info(model.id, revision=model.revision, files_metadata=True, timeout=HUB_READ_TIMEOUT_S)
    if "model_index.json" not in [entry.rfilename for entry in info.siblings or []]:
        raise ConfigError(f"{model.id} on the hub is not a diffusers repository: it has no model_index.json")
    return info, _small_file(model, "model_index.json", model.revision)


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
    check_whole(folder, located.variant, "delete it from the cache and run again")
    check_sizes(folder, located.variant)
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
