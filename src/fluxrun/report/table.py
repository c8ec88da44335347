"""A sweep's result as a table on the screen, fastest job first; as wide as the terminal, never wider."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from fluxrun.config.catalog import is_neutral_option
from fluxrun.formatting import decibels, seconds
from fluxrun.record.schema import replacement
from fluxrun.report.rows import Result, Row, config_text, distinctive, label
from fluxrun.terminal import make_console

GIB = 2**30

WIDE = 160
"""Characters of a line where no terminal says how many there are: a log file should not lose columns."""

HEADINGS = ("s/step", "1st step", "s/image", "speed-up", "pays after", "PSNR", "SSIM", "prompt", "peak")

EXPENDABLE = (6, 4, 1, 7, 8)
"""Columns (SSIM, pays after, 1st step, prompt, peak) that a very narrow terminal loses, in this order."""

STYLES = {"failed": "red", "pending": "dim", "interrupted": "yellow", "running": "yellow"}


def show_result(result: Result, folder: Path) -> None:
    """Print the table, what fell back and failed and why, and where the files are."""
    out = make_console(stderr=True)
    width = out.width if out.is_terminal or os.environ.get("COLUMNS") else WIDE
    for line in table_lines(result.jobs, width):
        out.print(line, soft_wrap=True)
    for text in [*_remarks(result), *summary_lines(result, folder)]:
        out.print(text, markup=False, highlight=False, soft_wrap=True)


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass
class _Columns:
    """Which figures are shown, and in how many characters each."""

    shown: list[int]
    widths: list[int]
    gap: int

    @property
    def width(self) -> int:
        return sum(self.widths) + self.gap * len(self.widths)

    def line(self, cells: Sequence[str]) -> str:
        """The shown cells, right-aligned, each with the gap before it."""
        return "".join(" " * self.gap + cells[n].rjust(width) for n, width in zip(self.shown, self.widths, strict=True))


def table_lines(rows: Sequence[Row], width: int) -> list[Text]:
    """The table within ``width`` characters: a line per job with a column per swept key, or else two lines."""
    done = [figures(row) for row in rows if row.status == "completed"]
    indent = max([3, *(len(row.job) for row in rows)]) + 2
    heading, labels = _key_columns(rows)
    common = [Text(line, style="bold") for line in textwrap.wrap(in_common(rows), width)]
    room = width - indent - len(heading)
    columns = _fitting(done, room, most_dropped=1)
    if columns.width <= room and len("  interrupted") <= room:
        found = [Text(f"{'job'.ljust(indent)}{heading}{columns.line(HEADINGS)}", style="bold")]
        for row, text in zip(rows, labels, strict=True):
            ended = columns.line(figures(row)) if row.status == "completed" else f"  {row.status}"
            found.append(Text(f"{row.job.ljust(indent)}{text}{ended}", style=STYLES.get(row.status, "")))
        return common + found
    columns = _fitting(done, width, most_dropped=len(EXPENDABLE))
    found = [Text("job", style="bold"), *([Text(columns.line(HEADINGS), style="bold")] if done else [])]
    for row in rows:
        style = STYLES.get(row.status, "")
        found += [Text(line, style=style) for line in _label_lines(row, rows, indent, width)]
        if row.status == "completed":
            found.append(Text(columns.line(figures(row)), style=style))
    return common + found


def _label_lines(row: Row, rows: Sequence[Row], indent: int, width: int) -> list[str]:
    text = description(row, rows) + ("" if row.status == "completed" else f": {row.status}")
    return textwrap.wrap(row.job.ljust(indent) + text, width, subsequent_indent=" " * indent)


def _key_columns(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """What the jobs differ in as columns, one per key: their heading, and the cells of each job."""
    said = [differences(row, rows) for row in rows]
    keys = list(dict.fromkeys(key for row in said for key in row))
    jobs = zip(said, rows, strict=True)
    lines = [keys, *([own.get(key, config_text(row.config, key)) for key in keys] for own, row in jobs)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(keys))]
    heading, *cells = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return heading, cells


def _columns(cells: Sequence[Sequence[str]], gap: int, without: Sequence[int] = ()) -> _Columns:
    """Columns in which some job has a figure."""
    shown = [n for n in range(len(HEADINGS)) if n not in without and any(line[n] != "–" for line in cells)]
    return _Columns(shown, [max(len(HEADINGS[n]), *(len(line[n]) for line in cells)) for n in shown], gap)


def _fitting(cells: Sequence[Sequence[str]], width: int, most_dropped: int) -> _Columns:
    """Columns for so many characters: closer together, then fewer, until they fit or no more may be dropped."""
    for gap, without in [(2, 0), *((1, count) for count in range(most_dropped + 1))]:
        columns = _columns(cells, gap, EXPENDABLE[:without])
        if columns.width <= width:
            break
    return columns


def description(row: Row, rows: Sequence[Row]) -> str:
    """What tells a job from the others, as one text: ``key=requested→effective``, a fallback marked with ``!``."""
    return " ".join(f"{key}={value}" if value else key for key, value in differences(row, rows).items()) or label(
        row, rows
    )


def differences(row: Row, rows: Sequence[Row]) -> dict[str, str]:
    """By key, what tells a job from the others: its own overrides, and unswept options that ran in this job only."""
    found = {key: value for key, _, value in (word.partition("=") for word in distinctive(row, rows))}
    everywhere = _everywhere(rows)
    for group, chosen in row.options.items():
        ran = f"{group}={chosen.effective}"
        if group in found or (group != "model" and ran not in everywhere and _worth_saying(row, group)):
            changed = chosen.effective != chosen.requested
            found[group] = chosen.requested + (f"→{chosen.effective}" if changed else "") + "!" * chosen.fell_back
    return found


def effective(row: Row) -> str:
    """The options that ran and are not the neutral ones everyone has; fallbacks marked with ``!``."""
    shown = [
        f"{group}={chosen.effective}{'!' if chosen.fell_back else ''}"
        for group, chosen in row.options.items()
        if group != "model" and _worth_saying(row, group)
    ]
    return " ".join(shown) or ("neutral" if row.options else "")


def in_common(rows: Sequence[Row]) -> str:
    """One line for what all jobs share: model, size, steps, device, and options that are not neutral."""
    done = [row for row in rows if row.status == "completed"]
    facts = (
        {row.model for row in done},
        {"x".join(map(str, reversed(row.size))) for row in done},
        {f"{row.steps} steps" for row in done},
        {row.machine or row.device for row in done},
    )
    return ", ".join([*(known.pop() for known in facts if len(known) == 1), *sorted(_everywhere(rows))])


def _everywhere(rows: Sequence[Row]) -> set[str]:
    """``group=option`` of what ran in all of several jobs without being neutral."""
    done = [
        {f"{g}={c.effective}" for g, c in row.options.items() if g != "model" and _worth_saying(row, g)}
        for row in rows
        if row.status == "completed" and not any(c.fell_back for c in row.options.values())
    ]
    completed = sum(row.status == "completed" for row in rows)
    return set.intersection(*done) if len(done) == completed > 1 else set()


def _worth_saying(row: Row, group: str) -> bool:
    chosen = row.options[group]
    return chosen.fell_back or not is_neutral_option(group, chosen.effective)


def figures(row: Row) -> list[str]:
    """The measured cells, in the order of ``HEADINGS``; a dash for what was not measured."""
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


# --- around it ------------------------------------------------------------------------------------------------------


def _remarks(result: Result) -> list[str]:
    """Each fallback and each failure once, with the jobs it concerns."""
    found: dict[str, list[str]] = {}
    for row in result.jobs:
        for group, fallback in row.fallbacks:
            instead = f"fell back to {replacement(fallback, row.options[group].effective)} ({fallback.stage})"
            found.setdefault(f"! {group}={fallback.option} {instead}: {fallback.reason}", []).append(row.job)
        if row.reason and row.status == "failed":
            found.setdefault(f"x {explained(row.reason)}", []).append(row.job)
    lines = [f"{text} [{'job' if len(jobs) == 1 else 'jobs'} {_listed(jobs)}]" for text, jobs in found.items()]
    return lines + [f"note: {problem}" for problem in result.problems]


def explained(reason: str) -> str:
    """A failure's reason without the name of an error that explains itself."""
    name, _, rest = reason.partition(": ")
    return rest if name in ("ConfigError", "OptionUnavailable", "NotFinite") else reason


def _listed(jobs: Iterable[str]) -> str:
    return ", ".join(sorted(jobs, key=lambda name: (not name.isdigit(), name.zfill(9))))


def summary_lines(result: Result, folder: Path) -> list[str]:
    """How many jobs ended how, where the time went, and where the files are."""
    counts: dict[str, int] = {}
    for row in result.jobs:
        counts[row.status] = counts.get(row.status, 0) + 1
    totals = result.totals
    loads = f"loading {'once' if totals.loads == 1 else f'{totals.loads} times'} {totals.load_s:.1f} s"
    files = ", ".join(n for n in ("report.html", "sweep.csv", "sweep.json") if (folder / n).exists())
    return [
        f"{len(result.jobs)} job(s): {', '.join(f'{count} {status}' for status, count in counts.items())}; "
        f"{totals.wall_s:.1f} s in all, {loads} + jobs {totals.jobs_s:.1f} s",
        f"{folder}: {files}",
    ]
