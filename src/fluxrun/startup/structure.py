"""What transformers' model folders export, remembered: reading all five hundred takes half a second at every import."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from fluxrun.atomic import write_atomically
from fluxrun.errors import one_line
from fluxrun.paths import cache_dir

Structure = dict[frozenset[str], dict[str, set[str]]]
"""Backends that are needed → module → names in it."""

log = logging.getLogger("fluxrun.startup")


def remember_structure(module: ModuleType) -> None:
    """Have transformers (its ``utils.import_utils``) read the structure of all its models from a file of ours."""
    define: Callable[..., Structure] = module.define_import_structure
    code = Path(str(module.__file__))
    models = code.parents[1] / "models"

    @functools.wraps(define)
    def remembered(module_path: str, prefix: str | None = None) -> Structure:
        if Path(module_path) not in (models, models / "__init__.py"):  # one model's folder
            return define(module_path, prefix)
        file = _file_of(models, code, prefix)
        found = _read(file)
        if found is None:
            found = define(module_path, prefix)
            _write(file, found)
        return found

    module.define_import_structure = remembered  # type: ignore[attr-defined]


def _file_of(models: Path, code: Path, prefix: str | None) -> Path:
    """Another version, another installation, or one whose folders or code were changed, has another file."""
    stamps = [path.stat().st_mtime_ns for path in (models, code)]
    version = importlib.metadata.version("transformers")
    key = hashlib.sha256(json.dumps([os.fspath(models), stamps, prefix]).encode()).hexdigest()[:16]
    return cache_dir() / "imports" / f"transformers-{version}-{key}.json"


def _read(file: Path) -> Structure | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return {
            frozenset(backends): {module: set(names) for module, names in modules.items()} for backends, modules in data
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:  # half a file, or another's
        log.debug("%s is not used: %s", file, one_line(error))
        return None


def _write(file: Path, structure: Structure) -> None:
    data = [
        [sorted(backends), {module: sorted(names) for module, names in modules.items()}]
        for backends, modules in structure.items()
    ]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(data))
    except OSError as error:  # then it is read from the folders again the next time
        log.debug("cannot write %s: %s", file, one_line(error))
