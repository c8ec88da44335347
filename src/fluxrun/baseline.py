"""The job that all others are compared with, where the sweep has to find or draw it itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from fluxrun.catalog import Catalog
from fluxrun.config import GROUPS
from fluxrun.results import NEUTRAL
from fluxrun.resume import BASELINE

if TYPE_CHECKING:
    from fluxrun.grid import GridJob
    from fluxrun.sweep import SweepConfig


def wanted(config: SweepConfig, grid: Sequence[GridJob] | None, folder: Path) -> bool:
    """Whether the sweep must draw the neutral pictures itself, and has not yet."""
    asked = config.baseline == "neutral" or (config.min_psnr is not None and config.baseline == "auto")
    has_one = grid is not None and any(is_neutral(job.data) for job in grid)
    return asked and not has_one and not (folder / BASELINE / "run.json").exists()


def is_neutral(data: dict[str, Any]) -> bool:
    """Whether a config asks for neutral options only; ``auto`` where it chooses a placement or tiles."""
    names = [_name(data, group) for group in GROUPS if group != "model"]
    return all(name in (*NEUTRAL, "auto") for name in names)


def neutral_data(data: dict[str, Any], dirs: tuple[Path, ...]) -> dict[str, Any]:
    """The same run with every option neutral; where ``auto`` places the weights, it still does."""
    catalog = Catalog(dirs)
    changed = {}
    for group in GROUPS:
        name = next((n for n in catalog.names(group) if n in NEUTRAL), None)
        if group != "model" and name is not None and _name(data, group) not in (name, "auto"):
            changed[group] = option_data(catalog, group, name)
    return {**data, **changed}


def option_data(catalog: Catalog, group: str, name: str) -> dict[str, Any]:
    """An option's file as it lies in a composed config."""
    content = OmegaConf.to_container(OmegaConf.load(catalog.path(group, name)))
    assert isinstance(content, dict)
    return {"name": name, **{str(key): value for key, value in content.items()}}


def describes(wanted: str, data: dict[str, Any]) -> bool:
    """Whether ``key=value key=value`` (a group's value is its option) holds for a config."""
    pairs = [pair.partition("=") for pair in wanted.split()]
    return bool(pairs) and all(equals and _name(data, key) == value for key, equals, value in pairs)


def _name(data: dict[str, Any], key: str) -> str:
    value: Any = data
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return str(value.get("name")) if isinstance(value, dict) else str(value)
