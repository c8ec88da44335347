"""What a Hydra sweeper that optimises gets for a job: seconds per image, if the pictures stay near the baseline's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fluxrun.config.schema import SweepConfig
from fluxrun.report.comparison import worst_psnr
from fluxrun.report.rows import Row, baseline_elsewhere

WORTHLESS_S = 1e6
"""Seconds per image that a failed job, or one whose pictures went too far, counts as: finite, so that a sampler can
rank it, and far above any real time."""


def objective(row: Row, rows: Sequence[Row], root: Path, config: SweepConfig) -> float:
    """Seconds per image; a penalty for a failure, and one that grows with what is missing to ``sweep.min_psnr``.

    ``rows`` are what the sweep knows so far: no record of another job is read again.
    """
    if row.status != "completed" or row.image_s is None:
        return 2 * WORTHLESS_S
    if config.min_psnr is None:
        return row.image_s
    psnr = worst_psnr(row, [*rows, *baseline_elsewhere(config.baseline, root)], root, config.baseline)
    if psnr is None:
        return 2 * WORTHLESS_S
    return row.image_s if psnr >= config.min_psnr else WORTHLESS_S + (config.min_psnr - psnr)
