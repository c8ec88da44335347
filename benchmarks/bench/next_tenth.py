"""What ``scripts/next_tenth.py`` measured, judged against the targets set for one H100."""

import json
from collections.abc import Sequence
from pathlib import Path

from bench.results import Row, markdown

FILE = "next_tenth_h200.json"
LOSSLESS, FAST = "h100_lossless", "h100_fast"
STEP, PIL, PNG = "denoising step", "prompt to PIL", "prompt to PNG, one of six"
TARGETS: tuple[tuple[str, str, str, float, str], ...] = (
    ("klein", LOSSLESS, STEP, 55, "ms"),
    ("klein", FAST, STEP, 34, "ms"),
    ("dev", LOSSLESS, STEP, 435, "ms"),
    ("dev", FAST, STEP, 248, "ms"),
    ("klein", LOSSLESS, PIL, 265, "ms"),
    ("klein", FAST, PIL, 175, "ms"),
    ("klein", FAST, PNG, 190, "ms"),
    ("sustained", FAST, "pictures a second, batch 4", 6, "1/s"),
    ("klein9", LOSSLESS, STEP, 1.75, "×"),
    ("klein9", FAST, STEP, 2.6, "×"),
    ("klein9", LOSSLESS, PIL, 1.75, "×"),
    ("klein9", FAST, PIL, 2.6, "×"),
    ("edit", FAST, PIL, 2.3, "×"),
    ("large", FAST, STEP, 2.2, "×"),
    ("large", FAST, PIL, 2.2, "×"),
    ("large_dev", FAST, STEP, 2.2, "×"),
)
"""Group, setting, figure, target and its unit: at most so many ms, else at least so much."""
STEPS = 4
"""Of a klein picture."""
SW_POWER_CAP = 0x4
"""NVML's reason for lower clocks: the card draws what it may."""
MODELS = {
    "klein": "klein-4B", "dev": "dev", "sustained": "klein-4B, for 50 s", "klein9": "klein-9B",
    "edit": "klein-4B, one 1024×1024 reference", "large": "klein-4B, 2048×2048", "large_dev": "dev, 2048×2048",
}  # fmt: skip


def entries(results: Path) -> list[Row]:
    """The targets as rows of the summary; what was not measured has no value."""
    file = results / FILE
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"command": None, "rows": []}
    found = {(row["group"], row["setting"], row["what"]): row for row in content["rows"]}
    return [_judged(found, content["command"], *target) for target in TARGETS]


def _judged(found: Row, command: str | None, group: str, setting: str, what: str, target: float, unit: str) -> Row:
    row = found.get((group, setting, what), {})
    value, plain = row.get("median"), found.get((group, "plain", what), {}).get("median")
    if unit == "×":
        value = plain / value if plain and value else None
    met = None if value is None else value <= target if unit == "ms" else value >= target
    metric = f"{what}, times plain diffusers" if unit == "×" else what
    about = {"model": MODELS[group], "setting": setting, "metric": metric, "unit": unit, "value": value}
    steps = found.get((group, setting, "step in a picture"), {}).get("median")
    why = None
    if met is False:
        why = power_limit(row.get("gpu", {})) or (f"{STEPS * steps:.0f} ms of it are steps" if steps else None)
    return {**about, "plain_diffusers": plain, "target": target, "met": met, "why": why, "command": command}


def power_limit(gpu: Row) -> str | None:
    """What held a card's clocks when it had just drawn, where NVML says that it was the limit of its power."""
    if not int(gpu.get("clocks_event_reasons.active", "0"), 16) & SW_POWER_CAP:
        return None
    drawn, limit = float(gpu["power.draw"]), float(gpu["power.limit"])
    if drawn < 0.9 * limit:  # read a moment later, when the card had nothing to do
        return None
    return f"the card's power: {drawn:.0f} of {limit:.0f} W, {gpu['clocks.sm']} of {gpu['clocks.max.sm']} MHz"


def table(rows: Sequence[Row]) -> str:
    """What was aimed at, and what came of it."""
    return markdown(("model", "setting", "what", "target", "measured", "met", "why"), map(_line, rows))


def _line(row: Row) -> list[str]:
    sign, unit = "≤" if row["unit"] == "ms" else "≥", f" {row['unit']}"
    value = "not measured" if row["value"] is None else f"**{row['value']:.3g}**{unit}"
    about = [row["model"], f"`{row['setting']}`", row["metric"], f"{sign} {row['target']:g}{unit}", value]
    return [*about, {True: "yes", False: "missed", None: "–"}[row["met"]], row["why"] or ""]
