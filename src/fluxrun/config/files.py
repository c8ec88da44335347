"""Config folders as Hydra reads them: the search path, and one option file with what its defaults list brings."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fluxrun.config.origin import CheckingLoader, CheckingRepository
from fluxrun.config.sources import source_of
from fluxrun.config.unchanged import Stamp, stamp
from fluxrun.errors import ConfigError, one_line
from fluxrun.formatting import shorten
from fluxrun.trust import trusted

HYDRA_BASE = "1.3"
"""Hydra's ``version_base``."""

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException)


def search_path(dirs: tuple[Path, ...]) -> ConfigSearchPathImpl:
    """Hydra's search path over these config folders, the first one first."""
    path = create_automatic_config_search_path(None, None, str(dirs[-1]))
    assert isinstance(path, ConfigSearchPathImpl)
    for folder in dirs[:-1]:
        path.prepend(provider="command-line", path=source_of(folder))
    return path


def find_file(config_path: str, dirs: tuple[Path, ...]) -> Path | None:
    """The file of a config path such as ``preset/mine``, or None where it is not one of these folders'."""
    candidates = (folder / f"{config_path}.yaml" for folder in dirs)
    return next((path for path in candidates if os.path.isfile(path)), None)


@dataclass(frozen=True)
class OptionFile:
    """What an option file came to, and the files it was made of, as they were then."""

    data: dict[str, Any]
    stamps: dict[str, Stamp | None]

    def is_current(self, dirs: tuple[Path, ...]) -> bool:
        """Whether the same files would be read now, and none of them changed."""
        return all(_stamp(config_path, dirs) == then for config_path, then in self.stamps.items())


_remembered: dict[tuple[tuple[Path, ...], str, str, bool], OptionFile] = {}
"""By folders, group, name, and whether the trust rule was lifted."""


def read_option(dirs: tuple[Path, ...], group: str, name: str) -> dict[str, Any]:
    """An option's keys, as a composed config has them; a file that did not change is read once in a process.

    Raises ConfigError in one line that names the file, TrustError for one that is not trusted.
    """
    key = (dirs, group, name, trusted())
    known = _remembered.get(key)
    if known is None or not known.is_current(dirs):
        known = _remembered[key] = _read(dirs, group, name)
    return copy.deepcopy(known.data)


def _read(dirs: tuple[Path, ...], group: str, name: str) -> OptionFile:
    with _errors_name(find_file(f"{group}/{name}", dirs)):
        return _compose_option(dirs, group, name)


def check_defaults(dirs: tuple[Path, ...], group: str, name: str) -> None:
    """Raise ConfigError, which names the file, where an option's or a preset's defaults list cannot be followed."""
    if path := find_file(f"{group}/{name}", dirs):
        with _errors_name(path):
            defaults_of(dirs, group, name)


@contextlib.contextmanager
def _errors_name(path: Path | None) -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise ConfigError(f"{path}: its defaults list leads back to itself") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {shorten(error, 300)}") from error
    except (*COMPOSE_ERRORS, ValueError, OSError) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error


def _compose_option(dirs: tuple[Path, ...], group: str, name: str) -> OptionFile:
    """The option's node alone, by Hydra's own resolution of its defaults list."""
    loader, repository = _loader(dirs)
    entries = defaults_of(dirs, group, name)
    node = OmegaConf.select(loader._compose_config_from_defaults_list(entries, repository), group)
    if not isinstance(node, DictConfig):
        raise ValueError("must hold a mapping with a _target_ and knobs")
    data = OmegaConf.to_container(node, resolve=True)
    assert isinstance(data, dict)
    config_paths = {str(entry.config_path) for entry in entries}
    return OptionFile({str(k): v for k, v in data.items()}, {path: _stamp(path, dirs) for path in config_paths})


def defaults_of(dirs: tuple[Path, ...], group: str, name: str) -> list[ResultDefault]:
    """The files that ``+group=name`` brings into a config that is otherwise empty, read anew."""
    _, repository = _loader(dirs)
    repository.cache.clear()
    chosen = Override(OverrideType.ADD, key_or_group=group, value_type=ValueType.ELEMENT, _value=name)
    return create_defaults_list(repository, None, [chosen], prepend_hydra=False, skip_missing=False).defaults


@functools.cache
def _loader(dirs: tuple[Path, ...]) -> tuple[ConfigLoaderImpl, CachingConfigRepository]:
    """Hydra's loader over these folders; making the repository anew for each option costs more than reading it."""
    version.setbase(HYDRA_BASE)
    loader = CheckingLoader(search_path(dirs))
    return loader, CheckingRepository(loader.repository)


def _stamp(config_path: str, dirs: tuple[Path, ...]) -> Stamp | None:
    path = find_file(config_path, dirs)
    return None if path is None else stamp(path)
