"""``report.html``: a sweep on one page that holds everything it shows, and ``fluxrun report`` that rebuilds it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fluxrun.atomic import write_atomically
from fluxrun.config.catalog import is_neutral_option
from fluxrun.formatting import decibels, seconds
from fluxrun.paths import PACKAGE
from fluxrun.report.fidelity import UNREADABLE
from fluxrun.report.lanes import lanes
from fluxrun.report.plots import first_against_later, speed_against_fidelity
from fluxrun.report.rows import Picture, Result, Row, Setting, label
from fluxrun.report.table import GIB, effective, explained

THUMBNAIL_PIXELS = 384

MOST_PICTURES = 240
"""Pictures on the page; more would make it too heavy for a phone."""


@dataclass
class Shown:
    """One picture on the page."""

    number: int | None
    caption: str
    uri: str
    path: str
    picture: Picture
    is_baseline: bool


@dataclass
class Gallery:
    """Everything drawn for one prompt and seed, side by side."""

    prompt: str
    seed: int
    shown: list[Shown] = field(default_factory=list)


def write_report(result: Result, root: Path, path: Path) -> None:
    """Write the page; ``root`` is what the rows' paths are relative to."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PACKAGE / "report" / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters |= {"seconds": seconds, "decibels": decibels, "gigabytes": _gigabytes, "percent": _percent}
    page = templates.get_template("report.html.j2").render(
        result=result,
        settings=result.settings,
        measured=[s for s in result.settings if s.image_s is not None],
        unmeasured=[s for s in result.settings if s.image_s is None],
        verdict=verdict(result.settings),
        rows=[(row, label(row, result.jobs), effective(row)) for row in result.jobs],
        galleries=galleries(result, root),
        is_neutral_option=is_neutral_option,
        most_pictures=MOST_PICTURES if sum(len(r.images) for r in result.jobs) > MOST_PICTURES else None,
        scatter=_markup(speed_against_fidelity(result.settings)),
        bars=_markup(first_against_later(result.settings)),
        fallbacks=_grouped(
            (f"{g}={f.option}", f.reason, f.stage, row) for row in result.jobs for g, f in row.fallbacks
        ),
        failures=_grouped(("", explained(row.reason), "", row) for row in result.jobs if row.reason),
        counts=_counts(result.jobs),
        machines=sorted({row.machine for row in result.jobs if row.machine}),
        lanes=[(row, lanes(row.spans)) for row in result.jobs if row.spans],
        environment=_environment_table(result.environments),
        paying=[(n, s.pays_after) for n, s in enumerate(result.settings, 1) if s.pays_after and s.pays_after > 1],
        show_accuracy=any(s.accuracy is not None for s in result.settings),
    )
    write_atomically(path, page)


def verdict(settings: Sequence[Setting]) -> dict[str, Any]:
    """The sentences at the top: the baseline, the fastest setting, and the fastest one that keeps the picture."""
    measured = [s for s in settings if s.image_s is not None]
    faithful = [s for s in measured if s.psnr_db is not None and s.psnr_db >= 30]
    return {
        "baseline": next((s for s in measured if s.is_baseline), None),
        "fastest": measured[0] if measured else None,
        "faithful": faithful[0] if faithful else None,
    }


def galleries(result: Result, root: Path) -> list[Gallery]:
    """The pictures by prompt and seed, the baseline's first, then by speed; thumbnails inside the page."""
    numbers = {job: number for number, setting in enumerate(result.settings, 1) for job in setting.jobs}
    captions = {job: setting.label for setting in result.settings for job in setting.jobs}
    found: dict[tuple[str, int], Gallery] = {}
    left = MOST_PICTURES
    for row in sorted(result.jobs, key=lambda row: not row.is_baseline):
        for picture in row.images[:left]:
            uri = _thumbnail(root / picture.path)
            if uri is None:
                continue
            gallery = found.setdefault((picture.prompt, picture.seed), Gallery(picture.prompt, picture.seed))
            caption = captions.get(row.job, row.job)
            gallery.shown.append(Shown(numbers.get(row.job), caption, uri, picture.path, picture, row.is_baseline))
        left = max(0, left - len(row.images))
    return sorted(found.values(), key=lambda gallery: (gallery.prompt, gallery.seed))


def _thumbnail(path: Path) -> str | None:
    """A small picture as a data URI; None for a file that cannot be read, which the page's problems name."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except UNREADABLE:
        return None
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, format="WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def _grouped(entries: Any) -> list[dict[str, Any]]:
    """Equal reasons once, with all the jobs they concern."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for what, reason, stage, row in entries:
        found.setdefault((what, reason, stage), []).append(row.job)
    return [{"what": what, "reason": why, "stage": stage, "jobs": jobs} for (what, why, stage), jobs in found.items()]


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    return counts


def _environment_table(environments: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """One line per fact, one column per machine; what no machine has is left out."""
    keys = list(dict.fromkeys(key for environment in environments for key in environment))
    lines = [(key, [_text(key, e.get(key)) for e in environments]) for key in keys]
    return [(key.replace("_", " "), values) for key, values in lines if any(values)]


def _text(key: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{value / GIB:.1f} GB" if key.endswith("_bytes") and isinstance(value, (int, float)) else str(value)


def _gigabytes(value: int | None) -> str:
    return "–" if value is None else f"{value / GIB:.2f} GB"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _markup(svg: str | None) -> Markup | None:
    return None if svg is None else Markup(svg)
