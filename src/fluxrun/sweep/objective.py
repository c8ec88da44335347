"""What a Hydra sweeper that optimises gets for a job: seconds per image, if the pictures stay near the baseline's."""

from __future__ import annotations

from pathlib import Path

from fluxrun.config.schema import SweepConfig
from fluxrun.report.comparison import compare
from fluxrun.report.rows import Row, read_rows

WORTHLESS_S = 1e6
"""Seconds per image that a failed job, or one whose pictures went too far, counts as: finite, so that a sampler can
rank it, and far above any real time."""


def objective(row: Row, root: Path, config: SweepConfig) -> float:
    """Seconds per image; a penalty for a failure, and one that grows with what is missing to ``sweep.min_psnr``."""
    if row.status != "completed" or row.image_s is None:
        return 2 * WORTHLESS_S
    if config.min_psnr is None:
        return row.image_s
    psnr = _psnr(row, root, config)
    if psnr is None:
        return 2 * WORTHLESS_S
    return row.image_s if psnr >= config.min_psnr else WORTHLESS_S + (config.min_psnr - psnr)


def _psnr(row: Row, root: Path, config: SweepConfig) -> float | None:
    rows = read_rows(root, root)
    compare(rows, root, config.baseline)
    return next((found.psnr_db for found in rows if found.folder == row.folder), None)
