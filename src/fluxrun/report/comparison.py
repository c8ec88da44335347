"""Jobs against their baseline: speed-up, distance of the pictures, break-even, and the Pareto front."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fluxrun.report.fidelity import SHAPES, distance, missing, shows_prompt, unreadable
from fluxrun.report.rows import ALL_THE_SAME, BASELINE_ELSEWHERE, Row, Setting, config_value, distinctive


def compare(rows: Sequence[Row], root: Path, baseline: str = "auto", *, pictures: bool = True) -> list[str]:
    """Fill in what needs a baseline: speed-up, distances, accuracy, break-even.

    Without ``pictures`` none is looked at: to import what compares them takes a second. Returns what could not be
    compared, and why.
    """
    reason = missing() if pictures else "nothing is compared after an interrupt; fluxrun report does"
    candidates = baseline_rows(rows, baseline)
    for row in rows:
        row.is_baseline = row in candidates
        if pictures:
            _judge_prompts(row, root)
        base = _baseline_of(row, candidates)
        if base is None:
            continue
        row.speedup = _ratio(base.image_s, row.image_s)
        if reason is None:
            _measure_pictures(row, candidates, root)
    _break_even(rows, candidates)
    lost = _lost_pictures(rows, root) if pictures else []
    return [*([f"no PSNR and SSIM: {reason}"] if reason else []), *lost]


def _lost_pictures(rows: Sequence[Row], root: Path) -> list[str]:
    """One line for all pictures whose files are gone or are no images."""
    lost = [(row.job, why) for row in rows for image in row.images if (why := unreadable(root / image.path))]
    if not lost:
        return []
    jobs = ", ".join(dict.fromkeys(job for job, _ in lost))
    return [f"{len(lost)} picture(s) of job {jobs} cannot be read, and are not compared or shown (first {lost[0][1]})"]


def worst_psnr(row: Row, rows: Sequence[Row], root: Path, baseline: str = "auto") -> float | None:
    """Of one job's pictures, the largest distance from the baseline's; None where nothing can be compared."""
    candidates = baseline_rows(rows, baseline)
    if missing() is not None or _baseline_of(row, candidates) is None:
        return None
    measured = row.model_copy(deep=True)
    _measure_pictures(measured, candidates, root)
    return measured.psnr_db


def baseline_rows(rows: Iterable[Row], baseline: str) -> list[Row]:
    """The completed jobs that others are compared with: neutral ones, or those that ``key=value …`` describes."""
    done = [row for row in rows if row.status == "completed"]
    if baseline in ("auto", "neutral"):
        # Where the weights lie does not change a picture: better such a baseline than none.
        return [row for row in done if row.neutral()] or [row for row in done if row.neutral(but="memory")]
    elsewhere = [row for row in done if row.job == BASELINE_ELSEWHERE]
    return elsewhere or [row for row in done if matches(row, baseline)]


def matches(row: Row, wanted: str) -> bool:
    """Whether a job is what ``key=value key=value`` describes; a group's value is what was requested."""
    return all(_value(row, key) == value for key, _, value in (pair.partition("=") for pair in wanted.split()))


def _value(row: Row, key: str) -> str:
    if key in row.options:
        return row.options[key].requested
    return str(config_value(row.config, key))


def _context(row: Row) -> tuple[Any, ...]:
    """What a fair comparison of speed and pictures keeps equal."""
    call = (row.steps, tuple(row.size), row.config.get("guidance"), row.config.get("batch_size"))
    return (row.model, row.machine, row.device, *call)


def _baseline_of(row: Row, candidates: Sequence[Row]) -> Row | None:
    """The candidate in the same situation; with none there, the first on the same machine with the same size."""
    if row.status != "completed":
        return None
    same = [c for c in candidates if _context(c) == _context(row) and c.image_s is not None]
    same_seed = [c for c in same if _pictured(c) & _pictured(row)]
    if same:
        return (same_seed or same)[0]
    if any(candidate.neutral(but="memory") for candidate in candidates):
        return None  # the neutral job is a baseline for its own number of steps only; a chosen one is for all
    return next((c for c in candidates if (c.machine, c.size) == (row.machine, row.size)), None)


def _pictured(row: Row) -> set[tuple[str, int]]:
    return {(image.prompt, image.seed) for image in row.images}


def _measure_pictures(row: Row, candidates: Sequence[Row], root: Path) -> None:
    """Each picture's distance from a baseline's picture of the same prompt and seed."""
    for image in (image for image in row.images if image.finite):
        others = [
            other
            for candidate in candidates
            if _context(candidate) == _context(row) or not candidate.neutral(but="memory")
            for other in candidate.images
            if other.finite and (other.prompt, other.seed) == (image.prompt, image.seed)
        ]
        found = distance(root / image.path, root / others[0].path) if others else None
        if found is not None:
            image.psnr_db, image.ssim = found.psnr_db, found.ssim
    row.psnr_db = min((i.psnr_db for i in row.images if i.psnr_db is not None), default=None)
    row.ssim = min((i.ssim for i in row.images if i.ssim is not None), default=None)


def _judge_prompts(row: Row, root: Path) -> None:
    if row.model != SHAPES:
        return
    for image in (image for image in row.images if image.finite):
        image.shows_prompt = shows_prompt(root / image.path, image.prompt)
    judged = [image.shows_prompt for image in row.images if image.shows_prompt is not None]
    row.accuracy = sum(judged) / len(judged) if judged else None


def _break_even(rows: Sequence[Row], candidates: Sequence[Row]) -> None:
    """Each job's break-even against its baseline. The first image of a job that continued is its predecessor's."""
    firsts = {_setting_key(row): row.first_image_s for row in reversed(rows) if not row.continued}
    for row in rows:
        base, first = _baseline_of(row, candidates), firsts.get(_setting_key(row))
        base_first = firsts.get(_setting_key(base)) if base else None
        if base is None or row.is_baseline:
            continue
        row.pays_after = break_even_after(first, row.image_s, base_first, base.image_s)


def break_even_after(
    first: float | None, later: float | None, base_first: float | None, base_later: float | None
) -> int | None:
    """Break-even: from how many images on they take no longer than with the baseline, the slower first one included;
    None for never.
    """
    if first is None or later is None or base_first is None or base_later is None:
        return None
    if first <= base_first and later <= base_later:
        return 1
    if later >= base_later:
        return None
    return max(1, math.ceil((first - base_first) / (base_later - later)) + 1)


def _ratio(base: float | None, value: float | None) -> float | None:
    return base / value if base and value else None


# --- settings -------------------------------------------------------------------------------------------------------

SAME_SETTING = ("prompt", "prompts_file", "seed", "num_images", "measure", "strict")


def _setting_key(row: Row) -> tuple[Any, ...]:
    rest = {key: value for key, value in row.config.items() if key not in SAME_SETTING}
    return (row.machine, repr(sorted(rest.items())))


def settings(rows: Sequence[Row]) -> list[Setting]:
    """The jobs grouped by everything but prompt and seed, fastest first, with the Pareto front marked."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.config:
            groups.setdefault(_setting_key(row), []).append(row)
    found = [_setting(group, rows) for group in groups.values()]
    _break_even_of_settings(found)
    mark_front(found)
    return sorted(found, key=lambda s: (s.image_s is None, s.image_s or 0.0))


def _setting(group: Sequence[Row], rows: Sequence[Row]) -> Setting:
    done = [row for row in group if row.status == "completed"]
    shown = done[0] if done else group[0]
    fresh = [row for row in done if not row.continued]
    return Setting(
        context=repr(_context(shown)),
        label=_setting_label(shown, rows),
        jobs=[row.job for row in group],
        status=_status(group, len(done)),
        effective={name: chosen.effective for name, chosen in shown.options.items()},
        fell_back=[name for name, chosen in shown.options.items() if chosen.fell_back],
        step_s=_median(row.step_s for row in done),
        image_s=_median(row.image_s for row in done),
        first_image_s=_median(row.first_image_s for row in fresh),
        psnr_db=min((row.psnr_db for row in done if row.psnr_db is not None), default=None),
        ssim=min((row.ssim for row in done if row.ssim is not None), default=None),
        accuracy=_mean(row.accuracy for row in done),
        peak_memory_bytes=max((row.peak_memory_bytes for row in done if row.peak_memory_bytes), default=None),
        speedup=_median(row.speedup for row in done),
        is_baseline=any(row.is_baseline for row in done),
    )  # fmt: skip


def _break_even_of_settings(found: Sequence[Setting]) -> None:
    """Each setting's break-even against the baseline's setting, from their medians."""
    bases = [setting for setting in found if setting.is_baseline]
    for setting in found:
        base = next((s for s in bases if s.context == setting.context), bases[0] if bases else None)
        if base is not None and not setting.is_baseline and setting.speedup is not None:
            firsts = setting.first_image_s, base.first_image_s
            setting.pays_after = break_even_after(firsts[0], setting.image_s, firsts[1], base.image_s)


def _status(group: Sequence[Row], done: int) -> str:
    if done in (0, len(group)):
        return group[0].status
    return f"{done} of {len(group)} completed"


def _setting_label(row: Row, rows: Sequence[Row]) -> str:
    kept = [word for word in distinctive(row, rows) if word.partition("=")[0].partition(".")[0] not in SAME_SETTING]
    return " ".join(kept) or ("neutral options" if row.neutral() else ALL_THE_SAME)


def mark_front(found: Sequence[Setting]) -> None:
    """Mark the settings that no other one of their context beats in both speed and distance from the baseline."""
    measured = [s for s in found if s.image_s is not None and s.psnr_db is not None]
    for setting in measured:
        setting.on_front = not any(_beats(other, setting) for other in measured)


def _beats(other: Setting, setting: Setting) -> bool:
    one, two = _coordinates(other), _coordinates(setting)
    return other.context == setting.context and one != two and one[0] <= two[0] and one[1] <= two[1]


def _coordinates(setting: Setting) -> tuple[float, float]:
    """Seconds and lost decibels: both better when smaller."""
    return (setting.image_s or 0.0, -(setting.psnr_db or 0.0))


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
