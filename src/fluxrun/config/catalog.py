"""Which options exist: the YAML files of the config folders, the user's before fluxrun's own."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fluxrun.config.files import read_option
from fluxrun.config.schema import GROUPS, validate_option
from fluxrun.errors import ConfigError
from fluxrun.formatting import nearest
from fluxrun.options.base import Option
from fluxrun.paths import conf_dir

RANDOM = (
    "draws with fresh noise at every step, which the seed's generator does not make: a seed would not mean one picture"
)
REFUSED_SCHEDULERS = {
    ("deis",): "DEIS does not converge on flow matching in diffusers 0.42.1 (15 dB from the converged picture)",
    ("sde", "dpmpp_sde", "dpmpp_2m_sde", "sasolver", "euler_a", "euler_ancestral"): RANDOM,
    ("lcm",): "FlowMatchLCM is for models that were distilled for it, which no FLUX.2 is",
    ("ddim", "pndm", "lms", "ddpm"): "it is for models that predict noise, FLUX.2 predicts a flow",
}
"""Schedulers that cannot be used, and why."""

REFUSED_WORDS = {
    ("attention", "slicing"): "attention slicing is not offered: sdpa and the other kernels already use little "
    "memory, and slicing only makes them slower (see docs/performance.md); for less memory use memory=balanced",
    **{("scheduler", name): why for names, why in REFUSED_SCHEDULERS.items() for name in names},
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
        data = self.data(group, name)
        if like is not None and like.name in self.names(group):
            data |= {k: v for k, v in self._changed(group, like).items() if k in data and k not in without}
        try:
            return validate_option(group, data)
        except ConfigError as error:
            raise type(error)(f"{self.path(group, name)}: {error}") from error

    def data(self, group: str, name: str) -> dict[str, Any]:
        """An option's file as it lies in a composed config, its defaults list followed; not validated."""
        self.path(group, name)
        return {"name": name, **read_option(self.dirs, group, name)}

    def loadable(self, group: str) -> dict[str, Option]:
        """Every option of a group but those whose file is wrong, by name."""
        return {name: found for name, found in self._load_all(group) if isinstance(found, Option)}

    def broken(self, group: str) -> dict[str, str]:
        """What is wrong with those whose file is, by name."""
        return {name: str(found) for name, found in self._load_all(group) if isinstance(found, ConfigError)}

    def _load_all(self, group: str) -> Iterator[tuple[str, Option | ConfigError]]:
        for name in self.names(group):
            try:
                yield name, self.load(group, name)
            except ConfigError as error:
                yield name, error

    def _changed(self, group: str, option: Option) -> Mapping[str, Any]:
        before = self.load(group, option.name)
        own = {"name", "fallback"}
        return {k: v for k, v in option.model_dump().items() if k not in own and v != getattr(before, k, v)}


# --- what the files say of themselves -----------------------------------------------------------------------------


def about(path: Path) -> str:
    """The first comment of an option's or a preset's file that is no header: when to use it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = (line.lstrip("# ").strip() for line in lines if line.startswith("#"))
    return next((text for text in comments if not text.startswith(("@package", "fluxrun +"))), "")


def purpose(group: str) -> str:
    """The comment of a group's line in the defaults list."""
    match = re.search(rf"^  - {group}: \S+\s+# (.+)$", _main_config(), re.MULTILINE)
    return match.group(1) if match else ""


def default_choices() -> dict[str, str]:
    """The option of each group that the defaults list names."""
    return dict(re.findall(r"^  - (\w+): (\w+)", _main_config(), re.MULTILINE))


def _main_config() -> str:
    return (conf_dir() / "config.yaml").read_text(encoding="utf-8")


@functools.cache
def neutral_options() -> dict[str, str]:
    """The neutral option of every group but ``model``: ``none``, or the one of ours that falls back to nothing."""
    catalog = Catalog()
    groups = {group: sorted(catalog.names(group), key="none".__ne__) for group in GROUPS if group != "model"}
    return {
        group: next(name for name in names if name == "none" or catalog.load(group, name).fallback == "error")
        for group, names in groups.items()
    }


def is_neutral_option(group: str, name: str) -> bool:
    """Whether an option is its group's neutral one; in a record from another version, of any group's."""
    known = neutral_options()
    return name == known[group] if group in known else name in known.values()
