"""The jobs of a sweep before any of them runs: in an order that loads weights seldom, composed, and hashed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from fluxrun.config.composition import compose_node, parse, raise_as_refusal, shown, to_data
from fluxrun.config.schema import validate_option
from fluxrun.errors import ConfigError
from fluxrun.options.groups import APPLY_ORDER, ROWS
from fluxrun.options.lora import LoraOption
from fluxrun.record.folder import data_hash
from fluxrun.report.rows import GridJob, Row
from fluxrun.weights.lora_files import LoraSource, find_adapters

WEIGHT_KEYS = ("preset", "model", "device", *(group for group in APPLY_ORDER if ROWS[group].loads_weights))
"""Whatever changes these loads other weights, so they change least often."""

RUN_KEYS = ("lora", "steps", "guidance", "prompts_file", "prompt", "negative_prompt", "num_images", "seed")
"""Whatever changes only these draws with the pipeline as it stands, so they change most often (LoRA: it is swapped)."""

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
    return 0 if name in ("hydra", "sweep") or name.startswith("hydra/") else 50


def compose_grid(hydra: Hydra, overrides: Sequence[str], dirs: tuple[Path, ...]) -> list[GridJob]:
    """Every job of Hydra's own sweeper. An unknown option or key refuses the whole sweep (ConfigError).

    Values are not looked at: one that only some jobs have wrong fails those jobs.
    """
    given = parse(hydra, overrides, dirs)
    try:
        batches = BasicSweeper.split_arguments(given, max_batch_size=None)
    except HydraException as error:  # interval(0,1), which only an optimising sweeper can use
        raise_as_refusal(error, overrides, dirs)
    jobs = []
    for number, job in enumerate(job for batch in batches for job in batch):
        data = to_data(compose_node(hydra, job, dirs))
        jobs.append(GridJob(number, tuple(shown(job)), data, data_hash(data)))
    return jobs


def describe_order(hydra: Hydra, overrides: Sequence[str], dirs: tuple[Path, ...]) -> list[str]:
    """The swept keys, slowest first."""
    return [str(o.get_key_element()) for o in parse(hydra, overrides, dirs) if o.is_sweep_override()]


def prompts_beside(data: dict[str, Any], jobs: Sequence[dict[str, Any]]) -> list[str]:
    """The prompts of all jobs with this one's model; a file's are read when its job runs."""
    same = [job.get("prompt") for job in jobs if job.get("model") == data.get("model") and not job.get("prompts_file")]
    texts = (prompt if isinstance(prompt, list) else [prompt] for prompt in same)
    return list(dict.fromkeys(text for found in texts for text in found if isinstance(text, str)))


def adapters_beside(data: dict[str, Any], jobs: Sequence[dict[str, Any]]) -> list[tuple[LoraSource, ...]]:
    """The LoRA files of all jobs with this one's model; those of a job that cannot be found are that job's affair."""
    nodes = [job["lora"] for job in jobs if job.get("model") == data.get("model") and isinstance(job.get("lora"), dict)]
    found = []
    for node in {str(node.get("files")): node for node in nodes if node.get("name") == data["lora"]["name"]}.values():
        with suppress(ConfigError):
            option = validate_option("lora", node)
            assert isinstance(option, LoraOption)
            found.append(find_adapters(option))
    return found


def pending_row(job: GridJob) -> Row:
    """A job that has not begun."""
    name = str(job.number)
    known = {"overrides": list(job.overrides), "config_hash": job.config_hash, "config": job.data}
    return Row(job=name, folder=name, status="pending", **known)
