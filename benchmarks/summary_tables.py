"""Rows as text: a line and a table for the screen, the Markdown tables of docs/performance.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from summary_rows import (
    MAIN_SAMPLE,
    Measured,
    Row,
    beyond_load,
    fallen_back,
    identity,
    image_s,
    median,
    newest,
    peak_gb,
    read,
    samples,
    step_s,
    summary,
)

NOT_MEASURED = "not measured"


# -- on the screen --------------------------------------------------------------------------------------------------


def line_of(row: Row) -> str:
    """A raw row in one line."""
    if "what" in row:
        return f"{row['what']:44} {median(row['samples']):8.5g} {row['unit']}"
    name = f"{row['setting']} {row.get('state', '')}".strip()
    if row["status"] != "measured":
        return f"{name:26} {row['status']}: {row['error']}"
    if "timings" in row:
        return f"{name:26} {_process_line(row)}{fallen_back(row)}"
    if "turns" in row:
        return f"{name:26} {_sizes_line(row)}{fallen_back(row)}"
    problem = f" [{row['error']}]" if row["error"] else ""
    return f"{name:26} {_samples_line(row)}{fallen_back(row)}{problem}"


def _samples_line(row: Row) -> str:
    key = next(key for key in ("total_s", "file_s", "decode_ms", "step_ms") if key in row["samples"])
    values, unit = samples(row, key), key.rpartition("_")[2]
    parts = [f"{median(values):8.4g} {unit} ({min(values):.4g}–{max(values):.4g}, n={len(values)})"]
    if row.get("rel_l2") is not None:
        parts.append(f"error {row['rel_l2']:.1e}")
    parts.append(f"first {row.get('first_call_s', 0):.1f} s")
    if row.get("peak_gb"):
        parts.append(f"{row['peak_gb']:.1f} GB")
    return ", ".join(parts)


def _sizes_line(row: Row) -> str:
    return ", ".join(
        f"{t['size'][1]}x{t['size'][0]} {median(t['step_ms']):.4g} ms (first {t['first_call_s']:.1f} s)"
        for t in row["turns"]
    )


def _process_line(row: Row) -> str:
    timings = row["timings"]
    seconds = f"imports {timings['import_s']:.1f} s, load {timings['load_s']:.1f} s, beyond {beyond_load(row):.1f} s"
    return f"{seconds}, image {image_s(row):.2f} s, peak {peak_gb(row):.1f} GB, process {row['process_s']:.0f} s"


def table_of(folder: Path) -> str:
    """The issue's table as far as this folder's results fill it."""
    measured = read([folder], tiny=True)
    cells = [["model", "setting", "what", "plain", "measured", "target", "met"]]
    for row in (row for row in summary(measured) if row["target"] is not None):
        met = {True: "yes", False: "NO", None: "–"}[row["met"]]
        numbers = [_number(row["plain_diffusers"]), _number(row["value"], NOT_MEASURED), _number(row["target"]), met]
        cells.append([row["model"], row["setting"], f"{row['metric']} [{row['unit']}]".removesuffix(" []"), *numbers])
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    note = (
        ["(a dry run with tiny models: no figure means anything)"] if any(m.content["tiny"] for m in measured) else []
    )
    return "\n".join([line.rstrip() for line in lines] + note)


def _number(value: float | None, missing: str = "–") -> str:
    return missing if value is None else f"{value:.4g}"


# -- in the document ------------------------------------------------------------------------------------------------


def tables(measured: Sequence[Measured], rows: Sequence[Row]) -> dict[str, str]:
    """Every table by the name of its marker."""
    return {
        "targets": _targets_table(rows),
        **{section: _section_table(measured, section) for section in MAIN_SAMPLE},
        "stages": _stages_table(measured),
        "first_image": _first_image_table(measured),
        "sizes": _sizes_table(measured),
        "memory": _memory_table(measured),
        "roofline": _roofline_table(measured),
        "machine": _machine_line(measured),
        "steps_plot": _picture(measured, ("klein", "dev"), "steps", "One denoising step by setting, with its floors"),
        "image_plot": _picture(measured, ("image",), "image", "Prompt to image by setting and stage"),
        "sizes_plot": _picture(measured, ("sizes",), "sizes", "One denoising step by picture size"),
    }


def _picture(measured: Sequence[Measured], sections: Sequence[str], name: str, alternative: str) -> str:
    """A plot, where there is something to draw."""
    there = any(one.section in sections for one in measured)
    return f"![{alternative}](images/performance_{name}.svg)" if there else ""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, or that nothing was measured."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    if not body:
        return f"*{NOT_MEASURED.capitalize()} yet.*"
    return "\n".join([f"| {' | '.join(header)} |", "|" + "---|" * len(header), *body])


def _targets_table(rows: Sequence[Row]) -> str:
    def line(row: Row) -> list[str]:
        unit = f" {row['unit']}".rstrip()
        value, plain = row["value"], row["plain_diffusers"]
        faster = f"{plain / value:.2f}×" if value and plain and row["unit"] else "–"
        shown = NOT_MEASURED if value is None else f"**{value:.4g}**{unit}"
        met = {True: "yes", False: "no", None: "–"}[row["met"]]
        before = "–" if plain is None or not row["unit"] else f"{plain:.4g}{unit}"
        name, _, fallback = row["setting"].partition(" ")
        return [
            row["model"],
            f"`{name}` {fallback}".rstrip(),
            row["metric"],
            before,
            shown,
            faster,
            f"≤ {row['target']:g}{unit}",
            met,
        ]

    header = ("model", "setting", "what", "plain diffusers", "measured", "faster", "target", "met")
    return markdown(header, (line(row) for row in rows if row["target"] is not None))


def _section_table(measured: Sequence[Measured], section: str) -> str:
    key, unit, scale, metric = MAIN_SAMPLE[section]
    found = newest(measured, section)
    compiled = _times_plain(found.get("plain_regional"), key)

    def line(one: Measured) -> list[str]:
        values = samples(one.row, key)
        value, plain = median(values, scale), one.plain()
        base = median(samples(plain.row, key), scale) if plain else None
        error = one.row.get("rel_l2")
        return [
            f"`{one.row['setting']}`" + fallen_back(one.row),
            f"**{value:.4g}**",
            f"{min(values) * scale:.4g}–{max(values) * scale:.4g}, n={len(values)}",
            f"{base / value:.2f}×" if base and value else "–",
            f"{base / value / compiled:.2f}×" if base and value and compiled else "–",
            "–" if error is None else f"{error:.1e}",
            f"{one.row.get('first_call_s', 0):.1f} s",
        ]

    header = ("setting", f"{metric}, {unit}", "min–max", "× plain", "× plain compiled", "error", "first call")
    order = sorted(found.values(), key=lambda one: -statistics.median(samples(one.row, key) or [0]))
    return markdown(header, (line(one) for one in order if samples(one.row, key)))


def _times_plain(one: Measured | None, key: str) -> float | None:
    """How many times faster than the plain diffusers beside it."""
    plain = one.plain() if one is not None else None
    if one is None or plain is None:
        return None
    return statistics.median(samples(plain.row, key)) / statistics.median(samples(one.row, key))


def _stages_table(measured: Sequence[Measured]) -> str:
    def line(one: Measured) -> list[str]:
        stages = [median(samples(one.row, key), 1e3) for key in ("text_s", "denoise_s", "decode_s", "total_s")]
        return [f"`{one.row['setting']}`", *(f"{stage:.4g}" for stage in stages if stage is not None)]

    header = ("setting", "text encoder, ms", "4 steps, ms", "decode to PIL, ms", "all in one go, ms")
    return markdown(header, (line(one) for one in newest(measured, "image").values()))


def _first_image_table(measured: Sequence[Measured]) -> str:
    def line(one: Measured) -> list[str]:
        timings = one.row["timings"]
        known = timings["import_s"], timings["load_s"]
        numbers = (one.row["process_s"], *known, beyond_load(one.row), timings["first_call_s"])
        return [f"`{one.row['setting']}`" + fallen_back(one.row), one.row["state"], *(f"{n:.1f} s" for n in numbers)]

    header = ("setting", "compiled code", "whole process", "imports", "load", "beyond both", "of it the first step")
    return markdown(header, (line(one) for one in newest(measured, "first_image").values()))


def _sizes_table(measured: Sequence[Measured]) -> str:
    def lines(one: Measured) -> Iterator[list[str]]:
        for turn in one.row["turns"]:
            height, width = turn["size"]
            made = {k: v for k, v in turn["counts"].items() if v and _is_count(k)}
            counted = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in made.items()) or "nothing new"
            numbers = [f"{median(turn['step_ms']):.4g}", f"{turn['first_call_s']:.1f} s", counted]
            yield [f"`{one.row['setting']}`", f"{width}×{height}", *numbers]

    header = ("setting", "size", "ms per step", "first call", "compiled or captured")
    return markdown(header, (line for one in newest(measured, "sizes").values() for line in lines(one)))


def _is_count(key: str) -> bool:
    return key in ("graphs_compiled", "recompiles", "graph_breaks", "cudagraphs", "cuda_graphs")


def _memory_table(measured: Sequence[Measured]) -> str:
    """Also what did not work: that a mode does not fit is a result."""
    found = {name: one.row for name, one in newest(measured, "memory").items()}
    for content in {id(one.content): one.content for one in measured if one.section == "memory"}.values():
        for row in content["rows"]:
            found.setdefault(identity(row), row)

    def line(row: Row) -> list[str]:
        about = [row["setting"], f"{row['budget_gb']:g} GB"]
        if row["status"] != "measured":
            return [*about, "–", "–", "–", "–", f"{row['status']}: {row['error']}"]
        used = row["options"]["memory"]["effective"]
        step = f"{step_s(row):.3f} s" if step_s(row) else "–"
        return [*about, used, f"{peak_gb(row):.1f} GB", step, f"{image_s(row):.2f} s", f"{row['steps']} steps"]

    header = ("what", "limit", "placement", "peak", "step", "s per image", "note")
    return markdown(header, map(line, sorted(found.values(), key=lambda row: (row["model"], row["budget_gb"]))))


def _roofline_table(measured: Sequence[Measured]) -> str:
    found = newest(measured, "roofline").items()
    return markdown(("what", "measured"), ([n, f"{median(o.row['samples']):.4g} {o.row['unit']}"] for n, o in found))


def _machine_line(measured: Sequence[Measured]) -> str:
    if not measured:
        return f"*{NOT_MEASURED.capitalize()} yet.*"
    content = measured[0].content
    state, versions = content["before"], content["versions"]
    names = ("torch", "triton", "diffusers", "transformers", "torchao", "cache-dit", "xformers", "python")
    libraries = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    device = "CPU"
    if "name" in state:
        device = f"{state['name']}, driver {state['driver_version']}, power limit {state['power.limit']} W"
    return f"{device}; {libraries}; commit {str(versions.get('git_commit'))[:9]}."
