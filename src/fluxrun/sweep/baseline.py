"""The job that all others are compared with, where the sweep has to find or draw it itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluxrun.config.catalog import Catalog, is_neutral_option, neutral_options
from fluxrun.config.schema import GROUPS, RunConfig, SweepConfig
from fluxrun.errors import ConfigError
from fluxrun.record.folder import data_hash
from fluxrun.report.rows import GridJob, config_value
from fluxrun.types import JsonObject

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


LOADS = ("model", "device")
"""Jobs that agree in these draw their neutral pictures over the same weights."""


def missing(
    config: SweepConfig, grid: Sequence[GridJob] | None, job: GridJob, dirs: tuple[Path, ...]
) -> dict[str, dict[str, Any]]:
    """Neutral runs, by config hash, that are to be compared with this job and that no job of the sweep itself draws.

    All those of the jobs over the same weights come together: going to and fro would build and compile every time.
    """
    if not (config.baseline == "neutral" or (config.min_psnr is not None and config.baseline == "auto")):
        return {}
    alike = [j for j in grid or (job,) if all(j.data.get(key) == job.data.get(key) for key in LOADS)]
    drawn = {j.config_hash for j in grid or ()}
    wanted = (neutral_data(j.data, dirs) for j in alike)
    return {name: data for data in wanted if (name := data_hash(data)) not in drawn and _valid(data, dirs)}


def wanted(config: SweepConfig, grid: Sequence[GridJob], dirs: tuple[Path, ...]) -> Iterator[GridJob]:
    """The neutral runs that the jobs of a whole grid are missing, as jobs without a number."""
    firsts = {repr([job.data.get(key) for key in LOADS]): job for job in reversed(grid)}
    for job in reversed(firsts.values()):
        yield from as_jobs(missing(config, grid, job, dirs))


def as_jobs(baselines: dict[str, dict[str, Any]]) -> list[GridJob]:
    """Neutral runs as jobs that have no number in the grid."""
    return [GridJob(-1, (), data, config_hash) for config_hash, data in baselines.items()]


def baseline_label(job: GridJob) -> str:
    """What a neutral run is called while it is drawn."""
    return f"neutral options, seed={job.data.get('seed')}"


def _valid(data: JsonObject, dirs: tuple[Path, ...]) -> bool:
    """Whether there can be such a run at all: a job with ``steps=0`` has no baseline, and says itself why it fails."""
    try:
        RunConfig.from_dict(data, dirs)
    except ConfigError:
        return False
    return True


def is_neutral(data: JsonObject) -> bool:
    """Whether a config asks for neutral options only; ``auto`` where it chooses a placement or tiles."""
    names = ((group, config_value(data, group)) for group in GROUPS if group != "model")
    return all(name == "auto" or is_neutral_option(group, name) for group, name in names)


def neutral_data(data: JsonObject, dirs: tuple[Path, ...], keep: Sequence[str] = ()) -> dict[str, Any]:
    """The same run with every option neutral but those of the groups in ``keep``; where ``auto`` places the weights,
    it still does."""
    catalog = Catalog(dirs)
    changed = {
        group: catalog.data(group, name)
        for group, name in neutral_options().items()
        if group not in keep and config_value(data, group) not in (name, "auto")
    }
    return {**data, **changed}


def describes(wanted: str, data: JsonObject) -> bool:
    """Whether ``key=value key=value`` (a group's value is its option) holds for a config."""
    pairs = [pair.partition("=") for pair in wanted.split()]
    return bool(pairs) and all(equals and str(config_value(data, key)) == value for key, equals, value in pairs)
