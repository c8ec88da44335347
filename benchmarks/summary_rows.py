"""The rows of the summary: what ``speed.py`` measured, read from its JSON and judged against the issue's targets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PLAIN = "plain"

MAIN_SAMPLE = {
    "klein": ("step_ms", "ms", 1.0, "denoising step"),
    "dev": ("step_ms", "s", 1e-3, "denoising step"),
    "vae": ("decode_ms", "ms", 1.0, "VAE decode 1024x1024"),
    "image": ("total_s", "s", 1.0, "prompt to PIL image, 4 steps"),
    "files": ("file_s", "s", 1.0, "prompt to PNG file, one of six"),
    "long": ("total_s", "s", 1.0, "embeddings to PIL image, 50 steps"),
}
"""What each section is about: sample key, unit, factor to that unit, metric."""
MODEL = {
    "klein": "klein-4B",
    "dev": "dev",
    "vae": "VAE",
    "image": "klein-4B",
    "files": "klein-4B",
    "long": "dev",
    "sizes": "klein-4B",
}
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
            found.setdefault(identity(one.row), one)
    return found


def identity(row: Row) -> str:
    """What a row is about, within its section."""
    return row["what"] if "what" in row else f"{row['setting']} {row.get('state') or row.get('budget_gb', '')}".strip()


def samples(row: Row, key: str) -> list[float]:
    """All samples of a key, turn after turn."""
    return [value for turn in row.get("samples", {}).get(key, []) for value in turn]


def median(values: Sequence[float], scale: float = 1.0) -> float | None:
    """The median to four significant digits, or None for no values."""
    return float(f"{statistics.median(values) * scale:.4g}") if values else None


# -- the summary ----------------------------------------------------------------------------------------------------


def summary(measured: Sequence[Measured]) -> list[Row]:
    """The issue's table first, then everything else that was measured."""
    rows = [row for section in MAIN_SAMPLE for row in _timed(measured, section)]
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


def step_s(row: Row) -> float | None:
    """Seconds of a run's step once everything is warm; None for plain diffusers, whose steps are not timed there."""
    return (row["timings"].get("steady_step_s") or {}).get("median")


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
    options = {g: o for g, o in (row.get("options") or {}).items() if o.get("fallbacks")}
    parts = [
        f"{g}: {o['requested']} → {o['effective'] if o['effective'] != o['requested'] else 'a part of it'}"
        for g, o in options.items()
    ]
    return f" ({', '.join(parts)})" if parts else ""
