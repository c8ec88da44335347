"""A sweep's result as a table on the screen, fastest job first."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fluxrun.results import Result, Row, label

GIB = 2**30


def show_result(result: Result, folder: Path) -> None:
    """Print the table, what fell back and failed and why, and where the files are."""
    # Width of its own where nothing shows it live: a pipe or a log file should not lose columns.
    out = Console(stderr=True)
    if not out.is_terminal:
        out = Console(stderr=True, width=160)
    out.print(_table(result.jobs), soft_wrap=False)
    for line in _remarks(result):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in summary_lines(result, folder):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", "what differs", "ran with", "status"):
        table.add_column(name, overflow="fold")
    for name in ("s/step", "first step", "s/image", "speed-up", "pays after", "PSNR", "SSIM", "prompt", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        style = "red" if row.status == "failed" else "yellow" if row.status != "completed" else None
        table.add_row(row.job, label(row, rows), effective(row), row.status, *figures(row), style=style)
    return table


def effective(row: Row) -> str:
    """The options that ran and are not the neutral ones everyone has; fallbacks marked with ``!``."""
    from fluxrun.results import NEUTRAL

    shown = [
        f"{group}={chosen.effective}{'!' if chosen.fell_back else ''}"
        for group, chosen in row.options.items()
        if group != "model" and (chosen.effective not in NEUTRAL or chosen.fell_back)
    ]
    return " ".join(shown) or ("neutral" if row.options else "")


def figures(row: Row) -> list[str]:
    """The measured cells, in the table's order; a dash for what was not measured."""
    return [
        seconds(row.step_s),
        seconds(row.first_call_s),
        seconds(row.image_s),
        "baseline" if row.is_baseline else "–" if row.speedup is None else f"{row.speedup:.2f}x",
        "–" if row.pays_after is None else f"{row.pays_after} im.",
        decibels(row.psnr_db),
        "–" if row.ssim is None else f"{row.ssim:.4f}",
        "–" if row.accuracy is None else f"{row.accuracy:.0%}",
        "–" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / GIB:.2f} GB",
    ]


def seconds(value: float | None) -> str:
    """Seconds with three significant digits; milliseconds below a tenth."""
    if value is None:
        return "–"
    return f"{value * 1e3:.3g} ms" if value < 0.1 else f"{value:.3g} s"


def decibels(value: float | None) -> str:
    """PSNR; equal pictures have no finite one."""
    return "–" if value is None else "equal" if math.isinf(value) else f"{value:.1f} dB"


def _remarks(result: Result) -> list[str]:
    """Each fallback and each failure once, with the jobs it concerns."""
    found: dict[str, list[str]] = {}
    for row in result.jobs:
        for group, fallback in row.fallbacks:
            instead = f"fell back to {row.options[group].effective} ({fallback.stage})"
            found.setdefault(f"! {group}={fallback.option} {instead}: {fallback.reason}", []).append(row.job)
        if row.reason:
            found.setdefault(f"x {row.reason}", []).append(row.job)
    return [f"{text} [job {', '.join(jobs)}]" for text, jobs in found.items()] + [f"note: {p}" for p in result.problems]


def summary_lines(result: Result, folder: Path) -> list[str]:
    """How many jobs ended how, where the time went, and where the files are."""
    counts: dict[str, int] = {}
    for row in result.jobs:
        counts[row.status] = counts.get(row.status, 0) + 1
    totals = result.totals
    jobs = ", ".join(f"{count} {status}" for status, count in counts.items())
    files = ", ".join(n for n in ("report.html", "sweep.csv", "sweep.json") if (folder / n).exists())
    return [
        f"{len(result.jobs)} job(s): {jobs}; {totals.wall_s:.1f} s in all, "
        f"weights loaded {totals.loads} time(s) in {totals.load_s:.1f} s, jobs without loading {totals.jobs_s:.1f} s",
        f"{folder}: {files}",
    ]
