"""From the raw results of ``speed.py`` to summary.json, and to the tables and plots of docs/performance.md.

    python benchmarks/summarize.py                       # benchmarks/results/speed*/, docs/performance.md
    python benchmarks/summarize.py --results DIR --docs FILE

The newest measurement of each setting counts. What was not measured stands in the summary with ``value`` null: nothing
is guessed. Only what stands between ``<!-- speed:NAME -->`` and ``<!-- /speed:NAME -->`` in the document is rewritten.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
PLAIN = "plain"
NOT_MEASURED = "not measured"

MAIN_SAMPLE = {
    "klein": ("step_ms", "ms", 1.0, "denoising step"),
    "dev": ("step_ms", "s", 1e-3, "denoising step"),
    "vae": ("decode_ms", "ms", 1.0, "VAE decode 1024x1024"),
    "image": ("total_s", "s", 1.0, "prompt to PIL image, 4 steps"),
    "long": ("total_s", "s", 1.0, "embeddings to PIL image, 50 steps"),
}
"""What each section is about: sample key, unit, factor to that unit, metric."""
MODEL = {"klein": "klein-4B", "dev": "dev", "vae": "VAE", "image": "klein-4B", "long": "dev", "sizes": "klein-4B"}
ERROR = "relative L2 against plain eager, one step"


@dataclass(frozen=True)
class Target:
    """A row of the issue's table: it stands in the summary whether or not it was measured."""

    section: str
    setting: str
    target: float
    metric: str = ""
    """Empty: what the section is about."""


TARGETS = (
    Target("dev", "h100_lossless", 0.425),
    Target("dev", "h100_lossless", 0.03, ERROR),
    Target("dev", "h100_fast", 0.260),
    Target("klein", "h100_lossless", 55),
    Target("klein", "h100_lossless", 0.03, ERROR),
    Target("klein", "h100_fast", 37),
    Target("vae", "h100_lossless", 25),
    Target("image", "h100_lossless", 0.30),
    Target("image", "h100_fast", 0.22),
    Target("long", "h100_fast_fixed_cache", 7),
    Target("first_image", "h100_lossless", 20, "first image of a new process beyond imports and load, cold"),
    Target("first_image", "h100_lossless", 5, "first image of a new process beyond imports and load, warm"),
    Target("first_image", "h100_fast", 20, "first image of a new process beyond imports and load, cold"),
    Target("first_image", "h100_fast", 5, "first image of a new process beyond imports and load, warm"),
)
FLOORS = {"klein": (51.0, 31.0), "dev": (0.41, 0.233)}
"""A step's floor with every part at its measured ceiling: bf16, and fp8 linears."""


# -- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One row of one section file."""

    section: str
    row: Row
    content: Row

    @property
    def command(self) -> str:
        """The command that measured it."""
        return " ".join(self.content["command"])

    def plain(self) -> Measured | None:
        """Plain diffusers in the same run, side by side where that was so."""
        rows = [r for r in self.content["rows"] if r.get("setting") == PLAIN and r.get("status") == "measured"]
        beside = [r for r in rows if r.get("group") == self.row.get("group")]
        found = next(iter(beside or rows), None)
        return None if found is None else Measured(self.section, found, self.content)


def read(folders: Iterable[Path], tiny: bool = False) -> list[Measured]:
    """Every measured row below ``folders``, the newest first; dry runs (``tiny``) only when they are asked for."""
    files = (file for folder in folders for file in sorted(folder.glob("*.json")))
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    sections = [c for c in contents if isinstance(c, dict) and "section" in c and (tiny or not c["tiny"])]
    sections.sort(key=lambda content: content["before"]["at"], reverse=True)
    return [
        Measured(content["section"], row, content)
        for content in sections
        for row in content["rows"]
        if row.get("status") == "measured" or "what" in row
    ]


def newest(measured: Sequence[Measured], section: str) -> dict[str, Measured]:
    """By setting, the newest row of a section."""
    found: dict[str, Measured] = {}
    for one in measured:
        if one.section == section:
            found.setdefault(_identity(one.row), one)
    return found


def _identity(row: Row) -> str:
    return row["what"] if "what" in row else f"{row['setting']} {row.get('state', '')}".strip()


def samples(row: Row, key: str) -> list[float]:
    """All samples of a key, turn after turn."""
    return [value for turn in row.get("samples", {}).get(key, []) for value in turn]


def median(values: Sequence[float], scale: float = 1.0) -> float | None:
    """The median to four significant digits, or None for no values."""
    return float(f"{statistics.median(values) * scale:.4g}") if values else None


# -- the summary ----------------------------------------------------------------------------------------------------


def summary(measured: Sequence[Measured]) -> list[Row]:
    """The issue's table first, then everything else that was measured."""
    rows = [row for section in ("klein", "vae", "image", "dev", "long") for row in _timed(measured, section)]
    rows += [*_first_images(measured), *_sizes(measured), *_memory(measured), *_roofline(measured)]
    targets = [_with_target(target, rows) for target in TARGETS]
    taken = {id(row) for _, row in targets if row is not None}
    return [made for made, _ in targets] + [row for row in rows if id(row) not in taken]


def _entry(one: Measured, model: str, metric: str, unit: str, value: float | None, plain: float | None) -> Row:
    return {
        "model": model,
        "setting": one.row.get("setting", "") + fallen_back(one.row),
        "metric": metric,
        "unit": unit,
        "value": value,
        "plain_diffusers": plain,
        "target": None,
        "met": None,
        "command": one.command,
    }


def _timed(measured: Sequence[Measured], section: str) -> Iterator[Row]:
    key, unit, scale, metric = MAIN_SAMPLE[section]
    for one in newest(measured, section).values():
        plain = one.plain()
        beside = median(samples(plain.row, key), scale) if plain else None
        yield _entry(one, MODEL[section], metric, unit, median(samples(one.row, key), scale), beside)
        error = one.row.get("rel_l2")
        if error is not None and section in ("klein", "dev") and one.row["setting"] != PLAIN:
            yield _entry(one, MODEL[section], ERROR, "", float(f"{error:.3g}"), 0.0)


def _first_images(measured: Sequence[Measured]) -> Iterator[Row]:
    for one in newest(measured, "first_image").values():
        metric = f"first image of a new process beyond imports and load, {one.row['state']}"
        yield _entry(one, "klein-4B", metric, "s", beyond_load(one.row), None)


def beyond_load(row: Row) -> float:
    """Seconds of a ``fluxrun`` run less importing its libraries and loading its weights."""
    timings = row["timings"]
    return round(timings["total_s"] - timings["import_s"] - timings["load_s"], 2)


def _sizes(measured: Sequence[Measured]) -> Iterator[Row]:
    for one in newest(measured, "sizes").values():
        for turn in one.row.get("turns", []):
            height, width = turn["size"]
            value = median(turn["step_ms"])
            yield _entry(one, "klein-4B", f"denoising step at {width}x{height}", "ms", value, None)


def _memory(measured: Sequence[Measured]) -> Iterator[Row]:
    for one in newest(measured, "memory").values():
        model, _, _ = one.row["setting"].partition(" ")
        limit, steps = f"{one.row['budget_gb']:g} GB", one.row["steps"]
        for metric, unit, value in (
            (f"peak memory under {limit}", "GB", peak_gb(one.row)),
            (f"image of {steps} steps under {limit}", "s", image_s(one.row)),
        ):
            yield _entry(one, model, metric, unit, value, None)


def peak_gb(row: Row) -> float:
    """Peak GPU memory of a ``fluxrun`` run in GB (2**30 bytes)."""
    return round(row["memory"]["peak_allocated_bytes"] / 2**30, 2)


def image_s(row: Row) -> float:
    """Seconds of a run's last image: text, steps and decode."""
    timings = row["timings"]
    return round(sum(timings["text_encode_s"]) + timings["denoise_s"][-1] + timings["decode_s"][-1], 3)


def _roofline(measured: Sequence[Measured]) -> Iterator[Row]:
    for name, one in newest(measured, "roofline").items():
        yield _entry(one, "roofline", name, one.row["unit"], median(one.row["samples"]), None)


def _with_target(target: Target, rows: Sequence[Row]) -> tuple[Row, Row | None]:
    """The target's row, and the measured one it was made of, if any."""
    model = MODEL.get(target.section, "klein-4B")
    _, unit, _, about = MAIN_SAMPLE.get(target.section, ("", "s", 1.0, target.metric))
    metric = target.metric or about
    found = next((r for r in rows if _matches(r, model, target.setting, metric)), None)
    if found is not None:
        return {**found, "target": target.target, "met": found["value"] <= target.target}, found
    missing = {"model": model, "setting": target.setting, "metric": metric, "unit": "" if metric == ERROR else unit}
    unmeasured = {"value": None, "plain_diffusers": None, "target": target.target, "met": None}
    return {**missing, **unmeasured, "command": f"python benchmarks/speed.py OUT --only {target.section}"}, None


def _matches(row: Row, model: str, setting: str, metric: str) -> bool:
    return (row["model"], row["setting"].split(" (")[0], row["metric"]) == (model, setting, metric)


def fallen_back(row: Row) -> str:
    """`` (compile: cudagraphs → regional)`` for a setting that is not what it was asked to be; else nothing."""
    options = row.get("options") or {}
    parts = [f"{g}: {o['requested']} → {o['effective']}" for g, o in options.items() if o.get("fallbacks")]
    return f" ({', '.join(parts)})" if parts else ""


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
    key = next(key for key in ("total_s", "decode_ms", "step_ms") if key in row["samples"])
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


# -- the document ---------------------------------------------------------------------------------------------------


def document(text: str, measured: Sequence[Measured], rows: Sequence[Row]) -> str:
    """``text`` with what stands between each pair of markers made anew."""
    for name, table in tables(measured, rows).items():
        start, end = f"<!-- speed:{name} -->", f"<!-- /speed:{name} -->"
        pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
        text = pattern.sub(f"{start}\n{table}\n{end}".replace("\\", r"\\"), text)
    return text


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
        stages = [median(samples(one.row, key), 1e3) for key in ("text_s", "denoise_s", "decode_s")]
        return [f"`{one.row['setting']}`", *(f"{stage:.4g}" for stage in stages if stage is not None)]

    header = ("setting", "text encoder, ms", "4 steps, ms", "decode to PIL, ms")
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
    contents = [one.content for one in measured if one.section == "memory"][:1]

    def line(row: Row) -> list[str]:
        about = [row["setting"], f"{row['budget_gb']:g} GB"]
        if row["status"] != "measured":
            return [*about, "–", "–", "–", f"{row['status']}: {row['error']}"]
        used = row["options"]["memory"]["effective"]
        return [*about, used, f"{peak_gb(row):.1f} GB", f"{image_s(row):.2f} s", f"{row['steps']} steps"]

    header = ("what", "limit", "placement", "peak", "s per image", "note")
    return markdown(header, (line(row) for content in contents for row in content["rows"]))


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


# -- plots ----------------------------------------------------------------------------------------------------------


def plots(measured: Sequence[Measured], folder: Path) -> list[Path]:
    """Draw what was measured; returns the files."""
    from speed_plots import image_plot, sizes_plot, steps_plot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        steps_plot(newest(measured, "klein"), newest(measured, "dev"), FLOORS, folder / "performance_steps.svg"),
        image_plot(newest(measured, "image"), folder / "performance_image.svg"),
        sizes_plot(newest(measured, "sizes"), folder / "performance_sizes.svg"),
    ]
    return [path for path in drawn if path is not None]


def main() -> int:
    """Read, summarize, write; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--tiny", action="store_true", help="use dry runs, too")
    given = parser.parse_args()
    measured = read(sorted(given.results.glob("speed*/")), given.tiny)
    rows = summary(measured)
    target = given.results / "summary.json"
    target.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if given.docs.exists():
        text = given.docs.read_text(encoding="utf-8")
        given.docs.write_text(document(text, measured, rows), encoding="utf-8")
    written = [target, *plots(measured, given.docs.parent / "images")]
    known = sum(row["value"] is not None for row in rows)
    print(f"{len(rows)} rows ({known} measured): {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
