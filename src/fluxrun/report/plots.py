"""The two plots of a sweep's report, as SVG text that a page can hold."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from fluxrun.formatting import seconds
from fluxrun.report.rows import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, FRONT, FIRST, GRID = "#1f2933", "#9aa5b1", "#0f766e", "#d97706", "#e4e7eb"

WIDTH_INCHES = 5.0
"""Narrow, so that the text is still readable when a phone scales the plot down to its width."""

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "fluxrun",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def speed_against_fidelity(settings: Sequence[Setting]) -> str | None:
    """Seconds per image against PSNR, each setting with its number in the table; None with nothing to show."""
    points = [(n, s) for n, s in enumerate(settings, 1) if s.image_s is not None and s.psnr_db is not None]
    if not points:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 3.6), layout="constrained")
        axes = figure.add_subplot()
        finite = [s.psnr_db for _, s in points if s.psnr_db is not None and math.isfinite(s.psnr_db)]
        top = _ceiling(finite)
        _draw_front(axes, [s for _, s in points if s.on_front], top)
        for place, numbers, setting in _places(points, top):
            colour = FRONT if setting.on_front else SOFT
            axes.scatter(*place, s=70, color=colour, marker="D" if setting.is_baseline else "o", zorder=3)
            axes.annotate(numbers, place, xytext=(7, 6), textcoords="offset points", fontsize=10)
        _label_fidelity(axes, finite, top)
        axes.set_xlabel("seconds per image (left is faster)")
        axes.margins(x=0.15)
        axes.set_xlim(left=min(axes.get_xlim()[0], 0) if _spread(points) > 4 else None)
        axes.grid(color=GRID)
        return _svg(figure, "Seconds per image against PSNR to the baseline's pictures")


def _ceiling(finite: Sequence[float]) -> float:
    """Where equal pictures, whose PSNR is infinite, are drawn: a little above all others."""
    return max(finite) + max(4.0, 0.15 * (max(finite) - min(finite))) if finite else 100.0


def _height(setting: Setting, top: float) -> float:
    assert setting.psnr_db is not None
    return top if math.isinf(setting.psnr_db) else setting.psnr_db


def _places(points: Sequence[tuple[int, Setting]], top: float) -> list[tuple[tuple[float, float], str, Setting]]:
    """Points with their numbers; those that would lie on each other share one label."""
    reach = max(s.image_s or 0.0 for _, s in points) * 0.03
    places: list[tuple[tuple[float, float], list[int], Setting]] = []
    for number, setting in sorted(points, key=lambda point: not point[1].on_front):
        place = (setting.image_s or 0.0, _height(setting, top))
        near = next((p for p in places if abs(p[0][0] - place[0]) <= reach and abs(p[0][1] - place[1]) < 1.5), None)
        if near is None:
            places.append((place, [number], setting))
        else:
            near[1].append(number)
            places.append((place, [], setting))
    return [(place, ", ".join(map(str, sorted(numbers))), setting) for place, numbers, setting in places]


def _spread(points: Sequence[tuple[int, Setting]]) -> float:
    times = [s.image_s for _, s in points if s.image_s]
    return max(times) / min(times) if times else 1.0


def _draw_front(axes: Axes, front: Sequence[Setting], top: float) -> None:
    for context in {s.context for s in front}:
        line = sorted((s.image_s or 0.0, _height(s, top)) for s in front if s.context == context)
        axes.plot(*zip(*line, strict=True), color=FRONT, linewidth=1.5, drawstyle="steps-post", zorder=2)


def _label_fidelity(axes: Axes, finite: Sequence[float], top: float) -> None:
    axes.set_ylabel("PSNR to the baseline, dB (up is nearer)")
    bottom = min(finite, default=top - 10)
    axes.set_ylim(bottom - max(2.0, 0.1 * (top - bottom)), top + max(2.0, 0.12 * (top - bottom)))
    ticks = [tick for tick in axes.get_yticks() if bottom - 2 <= tick <= (max(finite) if finite else bottom)]
    ticks = [tick for tick in ticks if tick < top - 0.06 * (top - bottom)]
    axes.set_yticks([*ticks, top], [*(f"{tick:g}" for tick in ticks), "equal"])


def first_against_later(settings: Sequence[Setting]) -> str | None:
    """Bars of each setting's first image and of every later one; None with nothing to show."""
    shown = [(n, s) for n, s in enumerate(settings, 1) if s.image_s is not None and s.first_image_s is not None]
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 1.0 + 0.62 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        firsts = [s.first_image_s or 0.0 for _, s in shown]
        laters = [s.image_s or 0.0 for _, s in shown]
        rows = range(len(shown))
        axes.barh([r - 0.2 for r in rows], firsts, height=0.36, color=FIRST, label="first image")
        axes.barh([r + 0.2 for r in rows], laters, height=0.36, color=FRONT, label="every later one")
        # A compile of minutes beside images of milliseconds: only a logarithmic scale shows both.
        wide = max(firsts + laters) > 15 * min(firsts + laters)
        axes.set_xscale("log" if wide else "linear")
        axes.xaxis.set_major_formatter("{x:g}")
        for row, first, later in zip(rows, firsts, laters, strict=True):
            axes.annotate(seconds(first), (first, row - 0.2), xytext=(4, 0), textcoords="offset points", va="center")
            axes.annotate(seconds(later), (later, row + 0.2), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_yticks(list(rows), [f"setting {number}" for number, _ in shown])
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.set_xlabel("seconds" + (" (logarithmic)" if wide else ""))
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        return _svg(figure, "Seconds for the first image and for every later one, by setting")


def _svg(figure: Any, title: str) -> str:
    """The figure as an SVG element that fills the width it is given."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Title": title}, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    head, _, body = svg.partition(">")
    attributes = [a for a in head.split() if not a.startswith(("width=", "height=", "<svg"))]
    return f'<svg role="img" aria-label="{title}" {" ".join(attributes)}>{body}'
