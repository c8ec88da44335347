"""What a multirun adds to a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra

from fluxrun.compose import compose_node, parse_overrides


def check_composition(hydra: Hydra, overrides: Sequence[str], dirs: tuple[Path, ...]) -> None:
    """Compose every combination of options once: an unknown option or key refuses the whole sweep.

    Values are not looked at here: one that only some jobs have wrong fails those jobs. Raises ConfigError.
    """
    for job in expand(overrides):
        compose_node(hydra, job, dirs)


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The jobs' overrides as Hydra's basic sweeper makes them."""
    batches = BasicSweeper.split_arguments(parse_overrides(overrides), max_batch_size=None)
    return [list(job) for batch in batches for job in batch]
