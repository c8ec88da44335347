"""Which options exist: the YAML files of the config folders, the user's before fluxrun's own."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from fluxrun.config.schema import GROUPS, closed_knobs
from fluxrun.errors import ConfigError
from fluxrun.formatting import nearest
from fluxrun.options.base import Option, load_option
from fluxrun.paths import conf_dir
from fluxrun.trust import check_file

REFUSED_WORDS = {
    ("attention", "slicing"): "attention slicing is not offered: sdpa and the other kernels already use little "
    "memory, and slicing only makes them slower (see docs/performance.md); for less memory use memory=balanced",
}
"""Options users ask for by habit, and why they are not there."""


class Catalog:
    """The option files of a list of config folders, first folder first."""

    def __init__(self, dirs: tuple[Path, ...] = ()) -> None:
        self.dirs = dirs or (conf_dir(),)

    def names(self, group: str) -> list[str]:
        """The options of a group, sorted."""
        return sorted({path.stem for folder in self.dirs for path in (folder / group).glob("*.yaml")})

    def groups(self) -> dict[str, list[str]]:
        """Every option group with its options."""
        return {group: self.names(group) for group in GROUPS}

    def path(self, group: str, name: str) -> Path:
        """The file of an option; raises ConfigError with the nearest name when there is none."""
        for folder in self.dirs:
            path = folder / group / f"{name}.yaml"
            if os.path.isfile(path):  # not path.is_file(), which raises for a name that is too long
                return path
        reason = REFUSED_WORDS.get((group, name)) or nearest(name, self.names(group))
        raise ConfigError(f"unknown option {group}={name}: {reason}")

    def load(self, group: str, name: str, like: Option | None = None, without: tuple[str, ...] = ()) -> Option:
        """The option of a file; ``like`` hands on the values of knobs that both options have, ``without`` some.

        A knob is handed on only where the user changed it from what ``like``'s own file says.
        """
        node = self._node(group, name)
        if like is not None and like.name in self.names(group):
            node |= {k: v for k, v in self._changed(group, like).items() if k in node and k not in without}
        return load_option({**node, "name": name})

    def _node(self, group: str, name: str) -> dict[str, Any]:
        path = self.path(group, name)
        check_file(path, group, self.dirs[-1], closed=closed_knobs())
        node = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(node, dict):
            raise ConfigError(f"{path} must hold a mapping with a _target_ and knobs")
        return {str(key): value for key, value in node.items()}

    def _changed(self, group: str, option: Option) -> Mapping[str, Any]:
        before = self.load(group, option.name)
        own = {"name", "fallback"}
        return {k: v for k, v in option.model_dump().items() if k not in own and v != getattr(before, k, v)}


@functools.cache
def neutral_options() -> dict[str, str]:
    """The neutral option of every group but ``model``: the one of fluxrun's own that has nothing to fall back to."""
    catalog = Catalog()
    groups = ((group, catalog.names(group)) for group in GROUPS if group != "model")
    return {g: next(n for n in names if _fallback_of(catalog.path(g, n)) in (None, "error")) for g, names in groups}


def is_neutral_option(group: str, name: str) -> bool:
    """Whether an option is its group's neutral one; in a record from another version, of any group's."""
    known = neutral_options()
    return name == known[group] if group in known else name in known.values()


def _fallback_of(path: Path) -> str | None:
    fallback = yaml.safe_load(path.read_text(encoding="utf-8")).get("fallback")
    return None if fallback is None else str(fallback)
