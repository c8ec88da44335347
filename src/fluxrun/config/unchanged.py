"""fluxrun's own config files and Hydra's, read and merged once in a process: a sweep composes a config for each job."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra.core.default_element import ResultDefault
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig

from fluxrun.paths import conf_dir
from fluxrun.trust import trusted

Stamp = tuple[str, int, int]
"""A file with its time and size: what it held is still true while these are the same."""

MOST_MERGED = 64
"""Combinations of options that are kept merged; the one merged longest ago goes first."""


@dataclass(frozen=True)
class Read:
    """A config as Hydra has read it; nobody writes to it."""

    stamp: Stamp
    result: ConfigResult


_read: dict[tuple[str, str], Read] = {}
"""By source and the config's path in it. Other people's files are not in here: they are read, and looked at, anew."""


@dataclass
class Merged:
    """What a defaults list came to."""

    made_of: list[ConfigResult]
    """They live as long as this, so that their ids stay theirs."""
    config: DictConfig | None = None
    """None after the first time: a command that composes once does not pay for a copy."""


_merged: dict[tuple[Any, ...], Merged] = {}


class UnchangedFiles(ConfigRepository):
    """Hydra's sources, but for what was read before and is the same file still."""

    def __deepcopy__(self, memo: dict[int, Any]) -> UnchangedFiles:
        """Hydra copies it for each composition, and gives the copy new sources instead of changing these."""
        return copy.copy(self)

    def load_config(self, config_path: str) -> ConfigResult | None:
        """A config as Hydra reads it; its ``config`` may be another composition's, too, and is only read."""
        source = next((source for source in self.sources if source.is_config(config_path)), None)
        now = _stamp_in(source, config_path) if source else None
        if source is None or now is None:
            return super().load_config(config_path)
        known = _read.get((source.path, config_path))
        if known is None or known.stamp != now:
            found = super().load_config(config_path)
            if found is None or not _is_ours(found):
                return found
            known = _read[source.path, config_path] = Read(now, found)
        return copy.copy(known.result)


def stamp(path: Path | str) -> Stamp | None:
    """A file's stamp now; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return str(path), status.st_mtime_ns, status.st_size


def _stamp_in(source: ConfigSource, config_path: str) -> Stamp | None:
    """Of a file in a folder; what is installed, or registered by Hydra, stays as it is while a process lives."""
    if source.scheme() in ("pkg", "structured"):
        return source.path, 0, 0
    if source.scheme() != "file":
        return None
    return stamp(os.path.join(source.path, f"{config_path.removesuffix('.yaml')}.yaml"))


def _is_ours(found: ConfigResult) -> bool:
    return found.provider == "hydra" or found.path == f"file://{conf_dir()}"


def merged_before(defaults: Sequence[ResultDefault], repository: IConfigRepository) -> DictConfig | None:
    """A copy of what these files came to when they were merged before; None where they were not, or one has changed."""
    found = _key(defaults, repository)
    known = _merged.get(found[0]) if found else None
    return copy.deepcopy(known.config) if known else None


def keep_merged(defaults: Sequence[ResultDefault], repository: IConfigRepository, config: DictConfig) -> None:
    """Keep a copy of what these files came to the second time, if all of them are fluxrun's own or Hydra's."""
    if found := _key(defaults, repository):
        key, made_of = found
        if key in _merged:
            _merged[key].config = copy.deepcopy(config)
        else:
            _merged[key] = Merged(made_of)
        while len(_merged) > MOST_MERGED:
            del _merged[next(iter(_merged))]


def _key(
    defaults: Sequence[ResultDefault], repository: IConfigRepository
) -> tuple[tuple[Any, ...], list[ConfigResult]] | None:
    kept = {id(read.result.config) for read in _read.values()}
    results: list[ConfigResult] = []
    key: list[Any] = [trusted()]  # what the rule lets through while it is lifted is looked at when it is not
    for default in defaults:
        result = repository.load_config(str(default.config_path))
        if result is None or id(result.config) not in kept:
            return None
        results.append(result)
        key.append((id(result.config), default.config_path, default.package, default.is_self, default.primary))
    return tuple(key), results
