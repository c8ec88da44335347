"""The plots of docs/performance.md: SVG, light, legible on a phone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from summary_rows import Measured

GREY, BLUE, ORANGE, GREEN = "#9aa5b1", "#2f6fb3", "#d9822b", "#3c8d5a"
LABELS = {
    "plain": "plain diffusers",
    "plain_regional": "diffusers, blocks compiled",
    "plain_flux_fast": "flux-fast recipe",
    "h100_lossless": "fluxrun h100_lossless",
    "h100_fast": "fluxrun h100_fast (fp8)",
}
"""Settings that are plotted, in this order."""
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "fluxrun",  # the same data is the same file
}
Rows = Mapping[str, "Measured"]


def steps_plot(klein: Rows, dev: Rows, floors: Mapping[str, tuple[float, float]], path: Path) -> Path | None:
    """One step of klein-4B and of dev, as bars, with the floor of each number format."""
    parts = [(n, r, s) for n, r, s in (("klein", klein, 1.0), ("dev", dev, 1.0)) if _plotted(r)]
    if not parts:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(parts), 1, figsize=(7, 3.1 * len(parts)), layout="constrained", squeeze=False)
        for axis, (name, rows, scale) in zip(axes[:, 0], parts, strict=True):
            _bars(axis, rows, "step_ms", scale)
            unit = 1.0 if name == "klein" else 1e3
            for floor, text in zip(floors[name], ("bf16 floor", "fp8 floor"), strict=True):
                axis.axvline(floor * unit, color="#444444", linestyle=":", linewidth=1.2)
                at = axis.get_xaxis_transform()
                axis.text(floor * unit, 1.01, text, fontsize=10, ha="center", color="#444444", transform=at)
            axis.set_xlabel("ms per denoising step (1024×1024, median)")
            axis.set_title(
                {"klein": "FLUX.2 klein-4B", "dev": "FLUX.2 dev (32B)"}[name], loc="left", weight="bold", pad=20
            )
        return _save(figure, path)


def image_plot(rows: Rows, path: Path) -> Path | None:
    """Prompt to image, stacked by stage; the number and its mark are the whole in one go, without clocks between."""
    shown = _plotted(rows)
    if not shown:
        return None
    stages = (("text_s", "text encoder", GREEN), ("denoise_s", "4 steps", BLUE), ("decode_s", "decode", ORANGE))
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
        left = [0.0] * len(shown)
        for key, label, colour in stages:
            values = [_median(rows[name], key) * 1e3 for name in shown]
            axis.barh([LABELS[name] for name in shown], values, left=left, color=colour, label=label)
            left = [a + b for a, b in zip(left, values, strict=True)]
        whole = [_median(rows[name], "total_s") * 1e3 for name in shown]
        axis.plot(whole, range(len(whole)), "k|", markersize=18, label="in one go")
        _write_values(axis, whole)
        axis.set_xlabel("ms from prompt to PIL image (klein-4B, 1024×1024)")
        axis.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.35, 1.0), frameon=False, columnspacing=1)
        return _save(figure, path)


def sizes_plot(rows: Rows, path: Path) -> Path | None:
    """A step at each picture size, in the order of its area."""
    if not rows:
        return None
    sizes = {tuple(turn["size"]) for one in rows.values() for turn in one.row["turns"]}
    names = [f"{width}×{height}" for height, width in sorted(sizes, key=lambda size: size[0] * size[1])]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
        for (name, one), colour in zip(rows.items(), (BLUE, ORANGE, GREEN, GREY), strict=False):
            ms = {f"{t['size'][1]}×{t['size'][0]}": statistics.median(t["step_ms"]) for t in one.row["turns"]}
            shown = [n for n, size in enumerate(names) if size in ms]
            axis.plot(shown, [ms[names[n]] for n in shown], marker="o", color=colour, label=name)
        axis.set_xticks(range(len(names)), names)
        axis.set_ylabel("ms per step (klein-4B)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        return _save(figure, path)


def _bars(axis: Axes, rows: Rows, key: str, scale: float) -> None:
    shown = _plotted(rows)
    values = [_median(rows[name], key) * scale for name in shown]
    colours = [GREY if name.startswith("plain") else BLUE if "lossless" in name else ORANGE for name in shown]
    axis.barh([LABELS[name] for name in shown], values, color=colours)
    _write_values(axis, values)


def _write_values(axis: Axes, values: list[float]) -> None:
    for position, value in enumerate(values):
        axis.text(value, position, f" {value:.0f}" if value >= 100 else f" {value:.1f}", va="center")
    axis.set_xlim(0, max(values) * 1.15)
    axis.invert_yaxis()


def _plotted(rows: Rows) -> list[str]:
    return [name for name in LABELS if name in rows]


def _median(one: Measured, key: str) -> float:
    return statistics.median(value for turn in one.row["samples"][key] for value in turn)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
