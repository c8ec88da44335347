"""One job's run over a pool that is shared with the other jobs of its grid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fluxrun.config.schema import RunConfig
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.process.console import Reporter
from fluxrun.runner import run
from fluxrun.sweep.grid import adapters_beside, prompts_beside
from fluxrun.types import JsonObject


def draw_beside(
    jobs: Sequence[JsonObject],
    config: RunConfig,
    folder: Path,
    *,
    command: Sequence[str],
    pool: SessionPool,
    reporter: Reporter,
) -> None:
    """Draw a job; ``jobs`` are the configs of all, whose prompts and LoRA files may be loaded together."""
    pool.upcoming = prompts_beside(config.source, jobs)
    pool.upcoming_adapters = partial(adapters_beside, config.source, jobs)
    run(config, folder, command=command, pool=pool, reporter=reporter)
    if pool.interrupted is not None:
        raise pool.interrupted
