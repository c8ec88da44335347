"""The plots of docs/performance.md: SVG, light, legible on a phone."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import Measured, newest

GREY, BLUE, ORANGE, GREEN = "#9aa5b1", "#2f6fb3", "#d9822b", "#3c8d5a"
SHOWN = {
    "plain": ("plain diffusers", GREY),
    "plain_regional": ("diffusers, blocks compiled", GREY),
    "plain_flux_fast": ("flux-fast recipe", GREY),
    "h100_lossless": ("fluxrun h100_lossless", BLUE),
    "h100_fast": ("fluxrun h100_fast (fp8)", ORANGE),
}
"""Settings that are plotted, in this order."""
STYLE: Any = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "fluxrun",  # the same data is the same file
}
STEPS = {"klein": ("FLUX.2 klein-4B", 51.0, 31.0), "dev": ("FLUX.2 dev (32B)", 410.0, 233.0)}
"""Title, and a step's floor in ms with every part at its measured ceiling: bf16, and fp8 linears."""
STAGES = (("text_s", "text encoder", GREEN), ("denoise_s", "4 steps", BLUE), ("decode_s", "decode", ORANGE))
Rows = dict[str, Measured]


def links(rows: Sequence[Measured]) -> dict[str, str]:
    """For the document, by the name of the marker: nothing where there is nothing to draw."""
    there = {one.content["section"] for one in rows if one.done}
    shown = {name: f"![{text}](images/performance_{name}.svg)" for name, (_, text, _, _) in PLOTS.items()}
    return {f"{name}_plot": link if there & set(PLOTS[name][0]) else "" for name, link in shown.items()}


def write(rows: Sequence[Measured], folder: Path) -> list[Path]:
    """Draw what was measured; returns the files."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    written = []
    for name, (sections, _, draw, height) in PLOTS.items():
        if found := {section: part for section in sections if (part := newest(rows, section))}:
            with plt.rc_context(STYLE):
                size = (7, height * len(found))
                figure, axes = plt.subplots(len(found), 1, figsize=size, layout="constrained", squeeze=False)
                for axis, (section, part) in zip(axes[:, 0], found.items(), strict=True):
                    draw(axis, part, section)
                written.append(folder / f"performance_{name}.svg")
                figure.savefig(written[-1], metadata={"Date": None})
                plt.close(figure)
    return written


def _steps(axis: Any, rows: Rows, section: str) -> None:
    title, *floors = STEPS[section]
    shown = [name for name in SHOWN if name in rows]
    values = [statistics.median(rows[name].samples("step_ms")) for name in shown]
    axis.barh([SHOWN[name][0] for name in shown], values, color=[SHOWN[name][1] for name in shown])
    _write_values(axis, values)
    for floor, text in zip(floors, ("bf16 floor", "fp8 floor"), strict=True):
        axis.axvline(floor, color="#444444", linestyle=":", linewidth=1.2)
        at = axis.get_xaxis_transform()
        axis.text(floor, 1.01, text, fontsize=10, ha="center", color="#444444", transform=at)
    axis.set_xlabel("ms per denoising step (1024×1024, median)")
    axis.set_title(title, loc="left", weight="bold", pad=20)


def _image(axis: Any, rows: Rows, section: str) -> None:
    shown = [name for name in SHOWN if name in rows]
    left = [0.0] * len(shown)
    for key, label, colour in STAGES:
        values = [statistics.median(rows[name].samples(key)) * 1e3 for name in shown]
        axis.barh([SHOWN[name][0] for name in shown], values, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    whole = [statistics.median(rows[name].samples("total_s")) * 1e3 for name in shown]
    axis.plot(whole, range(len(whole)), "k|", markersize=18, label="in one go")
    _write_values(axis, whole)
    axis.set_xlabel("ms from prompt to PIL image (klein-4B, 1024×1024)")
    axis.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.35, 1.0), frameon=False, columnspacing=1)


def _sizes(axis: Any, rows: Rows, section: str) -> None:
    sizes = sorted(
        {tuple(turn["size"]) for one in rows.values() for turn in one.row["turns"]}, key=lambda s: s[0] * s[1]
    )
    for (name, one), colour in zip(rows.items(), (BLUE, ORANGE, GREEN, GREY), strict=False):
        ms = {tuple(turn["size"]): statistics.median(turn["step_ms"]) for turn in one.row["turns"]}
        shown = [n for n, size in enumerate(sizes) if size in ms]
        axis.plot(shown, [ms[sizes[n]] for n in shown], marker="o", color=colour, label=name)
    axis.set_xticks(range(len(sizes)), [f"{width}×{height}" for height, width in sizes])
    axis.set_ylabel("ms per step (klein-4B)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)


def _write_values(axis: Any, values: list[float]) -> None:
    for position, value in enumerate(values):
        axis.text(value, position, f" {value:.0f}" if value >= 100 else f" {value:.1f}", va="center")
    axis.set_xlim(0, max(values) * 1.15)
    axis.invert_yaxis()


PLOTS = {
    "steps": (("klein", "dev"), "One denoising step by setting, with its floors", _steps, 3.1),
    "image": (("image",), "Prompt to image by setting and stage", _image, 3.2),
    "sizes": (("sizes",), "One denoising step by picture size", _sizes, 3.6),
}
"""Each plot's sections, what stands where it cannot be seen, how it is drawn, inches for each section."""
