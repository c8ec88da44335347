"""The jobs of a sweep before any of them runs: in an order that loads weights seldom, composed, and hashed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from omegaconf import DictConfig, OmegaConf

from fluxrun.config.composition import compose_node, parse, shown, to_data
from fluxrun.config.schema import BESIDE_A_RUN, validate_option
from fluxrun.errors import ConfigError, TrustError
from fluxrun.formatting import counted
from fluxrun.options.groups import APPLY_ORDER, ROWS
from fluxrun.options.lora import LoraOption
from fluxrun.record.folder import plain_hash
from fluxrun.record.writing import plain
from fluxrun.report.rows import GridJob, Row, config_value
from fluxrun.sweep.axes import Axis, axes_of, changed, changes_of, differences
from fluxrun.types import JsonObject
from fluxrun.weights.lora_files import LoraSource, find_adapters

WEIGHT_KEYS = ("preset", "model", "device", *(group for group in APPLY_ORDER if ROWS[group].loads_weights))
"""Whatever changes these loads other weights, so they change least often."""

RUN_KEYS = ("lora", "steps", "guidance", "prompts_file", "prompt", "negative_prompt", "num_images", "seed")
"""Whatever changes only these draws with the pipeline as it stands, so they change most often (LoRA: it is swapped)."""

MOST_JOBS = 10_000
"""More are refused: a grid is listed job by job in sweep.json and in the table."""

GRID_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def is_grid(node: DictConfig) -> bool:
    """Whether Hydra's own sweeper runs the sweep: all jobs are known beforehand."""
    return str(node.hydra.sweeper.get("_target_")) == GRID_SWEEPER


def ordered(overrides: Sequence[str], params: dict[str, Any] | None) -> list[str]:
    """A sweep's overrides, a sweep file's ``hydra.sweeper.params`` included, in the order in which they vary.

    Hydra lets the last override vary fastest. Those that need other weights come first, seeds and prompts last.
    """
    given = {_key(override): override for override in [*(f"{k}={v}" for k, v in (params or {}).items()), *overrides]}
    return sorted(given.values(), key=_rank)


def _key(override: str) -> str:
    return override.partition("=")[0]


def _rank(override: str) -> int:
    name = _key(override).lstrip("+~").partition(".")[0].partition("@")[0]
    if name in WEIGHT_KEYS:
        return 1 + WEIGHT_KEYS.index(name)
    if name in RUN_KEYS:
        return 100 + RUN_KEYS.index(name)
    # A sweep file, and Hydra's own keys, are composed before what the command line adds.
    return 0 if name in BESIDE_A_RUN or name.startswith("hydra/") else 50


def axes_of_grid(hydra: Hydra, overrides: Sequence[str], dirs: tuple[Path, ...]) -> list[Axis]:
    """What a grid varies, slowest first, counted before anything is listed. Raises ConfigError for too many jobs."""
    axes = axes_of(parse(hydra, overrides, dirs))
    jobs = math.prod(axis.count for axis in axes)
    if jobs > MOST_JOBS:
        raise ConfigError(f"this sweep has {counted(jobs)} jobs, and {MOST_JOBS:,} are the most that one can have")
    return axes


def compose_grid(hydra: Hydra, axes: Sequence[Axis], dirs: tuple[Path, ...]) -> list[GridJob]:
    """Every job of a grid, as it will be when it is composed. An unknown option or key refuses it (ConfigError).

    Each option is composed once, not each job. Values are not looked at: one that only some jobs have wrong fails
    those jobs, and so does a combination that cannot be composed; jobs are composed when they come.
    """
    compose = Composer(hydra, dirs)
    values = [axis.values() for axis in axes]
    first = [listed[0][0] for listed in values]
    base = compose(first)
    changes = [
        changes_of(axis, values[place], base, hydra, partial(_beside, first, place, compose))
        for place, axis in enumerate(axes)
    ]
    jobs = list(itertools.product(*([override for override, _ in listed] for listed in values)))
    known = [
        changed(base, {path: value for one in chosen for path, value in one.items()})
        for chosen in itertools.product(*changes)
    ]
    if compose.interpolates or not _holds(known[-1], partial(compose, jobs[-1])):  # one axis depends on another
        known = [compose(job) for job in jobs]
    return [
        GridJob(number, tuple(shown(job)), data, plain_hash(data), _for_task(job))
        for number, (job, data) in enumerate(zip(jobs, known, strict=True))
    ]


class Composer:
    """A job's overrides to its config as plain data."""

    def __init__(self, hydra: Hydra, dirs: tuple[Path, ...]) -> None:
        self._hydra, self._dirs = hydra, dirs
        self.interpolates = False
        """Whether a config so far had a value that is made of other ones."""

    def __call__(self, overrides: Sequence[str]) -> dict[str, Any]:
        node = compose_node(self._hydra, overrides, self._dirs)
        raw = OmegaConf.to_container(node, resolve=False)
        assert isinstance(raw, dict)
        self.interpolates |= "${" in str([value for key, value in raw.items() if key not in BESIDE_A_RUN])
        return dict(plain(to_data(node)))


def _beside(first: Sequence[str], place: int, compose: Composer, override: str) -> dict[str, Any]:
    """The config of one value beside the first values of all other axes."""
    return compose([*first[:place], override, *first[place + 1 :]])


def _holds(known: JsonObject, compose: Callable[[], JsonObject]) -> bool:
    """Whether a job is as its axes say; where it cannot be composed, that is its own failure, later."""
    try:
        return not differences(known, compose())
    except TrustError:
        raise
    except ConfigError:
        return True


def _for_task(job: Sequence[str]) -> tuple[str, ...]:
    """What a job is composed with: Hydra's own overrides are the sweep's."""
    return tuple(o for o in job if not o.lstrip("+~").startswith(("hydra.", "hydra/")))


def prompts_beside(data: JsonObject, jobs: Sequence[JsonObject]) -> list[str]:
    """The prompts of all jobs with this one's model; a file's are read when its job runs."""
    same = [job.get("prompt") for job in jobs if job.get("model") == data.get("model") and not job.get("prompts_file")]
    texts = (prompt if isinstance(prompt, list) else [prompt] for prompt in same)
    return list(dict.fromkeys(text for found in texts for text in found if isinstance(text, str)))


def adapters_beside(data: JsonObject, jobs: Sequence[JsonObject]) -> list[tuple[LoraSource, ...]]:
    """The LoRA files of all jobs with this one's model; those of a job that cannot be found are that job's affair."""
    same = [job.get("lora") for job in jobs if job.get("model") == data.get("model")]
    nodes = [node for node in same if isinstance(node, Mapping) and node.get("name") == config_value(data, "lora")]
    found = []
    for node in {str(node.get("files")): node for node in nodes}.values():
        with suppress(ConfigError):
            option = validate_option("lora", node)
            assert isinstance(option, LoraOption)
            found.append(find_adapters(option))
    return found


def pending_row(job: GridJob) -> Row:
    """A job that has not begun; its config is made when it does."""
    name = str(job.number)
    known = {"overrides": list(job.overrides), "config_hash": job.config_hash}
    return Row(job=name, folder=name, status="pending", **known)
