"""The trust rule, by origin: what is in a file that is not fluxrun's own is looked at where Hydra puts it.

Hydra composes a config file by file. Its loader is ours here: each file passes the rule as it is merged, with the
package that a header, a defaults list or a folder gives it, whichever folder it lies in. So nothing of a stranger's is
in a composed config that was not looked at, and Hydra acts on none of it before.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ConfigDefault, GroupDefault, InputDefault, ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from fluxrun.config.schema import GROUPS, knobs_at
from fluxrun.config.unchanged import UnchangedFiles, keep_merged, merged_before
from fluxrun.paths import conf_dir
from fluxrun.reading import parse_yaml, read_text
from fluxrun.trust import interpolation_beyond_config, objection, refuse, trusted
from fluxrun.types import JsonObject

STEERS = "a config file may not steer Hydra itself"
ONLY_KEYS = "in other people's files ${…} may only name another key of the config"
CHOSEN_BY_NAME = "an option is chosen in a defaults list, not put together"

PRESET = "+preset"
"""What a sweep file may vary beside the keys and groups of the config."""

Path_ = tuple[str, ...]
"""Where a key lies in the config."""


class CheckingRepository(CachingConfigRepository):
    """Hydra's files, but for the look at their defaults lists, which Hydra resolves before it merges anything."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        """A file as Hydra reads it. Raises TrustError."""
        found = super().load_config(config_path)
        if found and found.defaults_list and not trusted() and (file := foreign_file(found, config_path)):
            for entry in found.defaults_list:
                _check_default(entry, file)
        return found


class CheckingLoader(ConfigLoaderImpl):
    """Hydra's loader, but for the look at what it merges. Raises TrustError."""

    _listed: tuple[tuple[str | None, tuple[str, ...]], CachingConfigRepository] | None = None

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        """As Hydra's; what did not change since another composition is not read again."""
        super().__init__(config_search_path)
        self.repository = UnchangedFiles(config_search_path)

    def get_group_options(
        self,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        """As Hydra's, but for the copy of all files that it makes for each of the groups that ``--help`` lists."""
        asked = (config_name, tuple(overrides or ()))
        if self._listed is None or self._listed[0] != asked:
            _, repository = self._parse_overrides_and_create_caching_repo(config_name, [*asked[1]])
            self._listed = (asked, repository)
        return self._listed[1].get_group_options(group_name, results_filter)

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Override], CachingConfigRepository]:
        parsed = OverridesParser.create().parse_overrides(overrides)
        repository = CheckingRepository(self.repository)
        self._process_config_searchpath(config_name, parsed, repository)
        return parsed, repository

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: Any) -> DictConfig:
        if (known := merged_before(defaults, repo)) is not None:
            return known
        merged = super()._compose_config_from_defaults_list(defaults, repo)
        keep_merged(defaults, repo, merged)
        return merged

    def _load_single_config(self, default: ResultDefault, repo: Any) -> ConfigResult:
        landed = super()._load_single_config(default, repo)
        if landed.config is repo.load_config(str(default.config_path)).config:
            landed = copy.copy(landed)  # Hydra takes its nodes into the config, and the next composition wants them too
            landed.config = copy.deepcopy(landed.config)
        file = foreign_file(landed, str(default.config_path))
        if file and not trusted():
            package = landed.header["package"] if default.package is None else default.package
            _check_file(file, landed, package or "", str(default.config_path).partition("/")[0])
        return landed

    def _process_config_searchpath(self, config_name: str | None, parsed_overrides: list[Override], repo: Any) -> None:
        """Refuse a stranger's main config that names more folders: Hydra may import a package to look into it."""
        primary: ConfigResult | None = repo.load_config(config_name) if config_name else None
        file = foreign_file(primary, str(config_name)) if primary else None
        if primary and file and not trusted() and OmegaConf.select(primary.config, "hydra.searchpath") is not None:
            raise refuse(file, "hydra.searchpath", STEERS)
        super()._process_config_searchpath(config_name, parsed_overrides, repo)


def foreign_file(result: ConfigResult, config_path: str) -> str | None:
    """The path of what Hydra read, unless it comes from fluxrun's own folder, from Hydra, or from installed code."""
    scheme, _, place = result.path.partition("://")
    if scheme == "structured" or result.path == "pkg://hydra.conf":
        return None
    path = Path(place) / f"{config_path}.yaml"
    own = scheme != "pkg" and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(conf_dir()))
    return None if own else str(path)


def check_recorded(config: JsonObject, where: str) -> None:
    """Refuse a config from a record or a picture that sets what is the command line's alone. Raises TrustError."""
    if not trusted() and (found := first_closed(config)):
        raise refuse(where, *found)


def first_closed(config: JsonObject) -> tuple[str, str] | None:
    """The first key of a config that is the command line's alone, and why; whether the rule is lifted or not."""
    objections = ((".".join(path), _objection(path, value)) for path, value in _leaves(config))
    return next(((key, why) for key, why in objections if why), None)


def _check_file(file: str, landed: ConfigResult, package: str, group: str) -> None:
    if not OmegaConf.is_dict(landed.config):
        return  # Hydra says that it cannot merge a list
    own_defaults = (*filter(None, package.split(".")), "defaults")
    for path, value in _leaves(OmegaConf.to_container(landed.config, resolve=False)):
        if path[: len(own_defaults)] == own_defaults:
            continue
        for text in (*path, *(value if isinstance(value, list) else [value])):
            # What a sweep varies is read twice: once as YAML, where \\${…} stands for ${…}, and once as an override.
            read = str(text).replace("\\", "") if path[0] == "hydra" else str(text)
            if beyond := interpolation_beyond_config(read):
                raise refuse(file, beyond, ONLY_KEYS)
        if path[0] == "hydra":
            _check_hydra(path, value, file, group)
        else:
            _check_knob(path, value, file)


def _check_default(entry: InputDefault, file: str) -> None:
    """A line of a defaults list picks options; it neither picks Hydra's own nor puts anything into Hydra's node."""
    name = entry.group if isinstance(entry, GroupDefault) else entry.path if isinstance(entry, ConfigDefault) else ""
    value = entry.value if isinstance(entry, GroupDefault) else ""
    for text in (str(name or ""), str(entry.package or "")):
        if "hydra" in re.split(r"[/.@]", text):
            raise refuse(file, text, STEERS)
    for text in (name, entry.package, *(value if isinstance(value, list) else [value])):
        if beyond := interpolation_beyond_config(str(text)):
            raise refuse(file, beyond, ONLY_KEYS)


def _check_hydra(path: Path_, value: Any, file: str, group: str) -> None:
    """Of ``hydra.*`` a sweep file sets two: that it is a sweep, and what it varies."""
    if group == "sweep" and path == ("hydra", "mode"):
        return
    if group != "sweep" or path[:3] != ("hydra", "sweeper", "params") or len(path) < 4:
        raise refuse(file, ".".join(path), STEERS)
    key = ".".join(path[3:])
    if key in GROUPS or key == PRESET:
        return
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key) or path[3] == "hydra":
        raise refuse(file, f"{'.'.join(path[:3])}: {key}", STEERS)
    for one in _values(key, value):
        _check_knob(path[3:], one, file)


def _values(key: str, swept: Any) -> Iterator[Any]:
    """The values that a sweep's parameter takes; where they cannot be told, its whole text."""
    try:
        override = OverridesParser.create().parse_override(f"{key}={swept}")
        is_listed = override.is_choice_sweep() or override.is_range_sweep()
        yield from override.sweep_iterator() if is_listed else [swept]
    except HydraException:
        yield swept


def _check_knob(path: Path_, value: Any, where: str) -> None:
    if why := _objection(path, value):
        raise refuse(where, ".".join(path), why)


def _objection(path: Path_, value: Any) -> str | None:
    """Why a value in a config that is not one's own may not be there, or None where it may."""
    if ".".join(path) in GROUPS and "${" in str(value):
        return CHOSEN_BY_NAME
    for depth, knob in knobs_at(path):
        # What lies below a knob is an entry of it, and not the knob's default even where it is empty.
        why = objection(knob, {path[-1]: value} if len(path) > depth else value)
        if why and value not in _own_values(path):
            return why
    return None


def _own_values(path: Path_) -> list[Any]:
    """What fluxrun's own option files set a group's knob to: a copy of one of them is no stranger than it."""
    if len(path) != 2 or path[0] not in GROUPS:
        return []
    files = (conf_dir() / path[0]).glob("*.yaml")
    return [parse_yaml(read_text(file)).get(path[1]) for file in sorted(files)]


def _leaves(content: Any, within: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every value of a mapping with where it lies; a dot in a key is one in its path."""
    if isinstance(content, Mapping) and (content or not within):
        for key, value in content.items():
            yield from _leaves(value, (*within, *str(key).split(".")))
    elif isinstance(content, list) and any(isinstance(item, Mapping | list) for item in content):
        for item in content:
            yield from _leaves(item, within)
    else:
        yield within, content
