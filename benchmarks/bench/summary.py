"""From the sections' results to the summary, judged against the targets, and to the tables of docs/performance.md."""

import re
from collections.abc import Mapping, Sequence

from bench import plots
from bench.results import Measured, Row, markdown, newest
from bench.sections import SECTIONS
from bench.timed import ERROR

FIRST = SECTIONS["first_image"].metric
TARGETS: tuple[tuple[str, str, str, float], ...] = (
    ("dev", "h100_lossless", "", 0.425),
    ("dev", "h100_lossless", ERROR, 0.03),
    ("dev", "h100_fast", "", 0.260),
    ("klein", "h100_lossless", "", 55),
    ("klein", "h100_lossless", ERROR, 0.03),
    ("klein", "h100_fast", "", 37),
    ("vae", "h100_lossless", "", 25),
    ("image", "h100_lossless", "", 0.30),
    ("image", "h100_fast", "", 0.22),
    ("long", "h100_fast_fixed_cache", "", 7),
    ("first_image", "h100_lossless", f"{FIRST}, cold", 20),
    ("first_image", "h100_lossless", f"{FIRST}, warm", 5),
    ("first_image", "h100_fast", f"{FIRST}, cold", 20),
    ("first_image", "h100_fast", f"{FIRST}, warm", 5),
)
"""Section, setting, metric (none: the section's), target: in the summary, measured or not."""
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "torchao", "cache-dit", "xformers", "python")


def summary(rows: Sequence[Measured]) -> list[Row]:
    """The targets first, then everything else that was measured."""
    entries = [e for name, s in SECTIONS.items() for one in newest(rows, name).values() for e in s.entries(one)]
    targets = [_judged(*target, entries) for target in TARGETS]
    taken = {_identity(row) for row in targets if row["value"] is not None}
    return targets + [row for row in entries if _identity(row) not in taken]


def _identity(row: Row) -> tuple[str, str, str]:
    return row["model"], row["setting"].split(" (")[0], row["metric"]


def _judged(name: str, setting: str, metric: str, target: float, entries: Sequence[Row]) -> Row:
    section = SECTIONS[name]
    about = (section.label, setting, metric or section.metric)
    if (found := next((row for row in entries if _identity(row) == about), None)) is not None:
        return {**found, "target": target, "met": found["value"] <= target}
    keys = "model", "setting", "metric", "unit", "value", "plain_diffusers", "target", "met", "command"
    command, unit = f"python benchmarks/speed.py OUT --only {name}", "" if metric == ERROR else section.unit
    return dict(zip(keys, (*about, unit, None, None, target, None, command), strict=True))


def document(text: str, made: Mapping[str, str]) -> str:
    """``text`` with what stands between each pair of markers made anew: the table of that name."""
    for name, table in made.items():
        start, end = f"<!-- speed:{name} -->", f"<!-- /speed:{name} -->"
        pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
        text = pattern.sub(f"{start}\n{table}\n{end}".replace("\\", r"\\"), text)
    return text


def tables(rows: Sequence[Measured]) -> dict[str, str]:
    """Every table by the name of its marker."""
    made = {name: table for section in SECTIONS.values() for name, table in section.tables(rows).items()}
    return {"targets": targets_table(summary(rows)), **made, "machine": _machine(rows), **plots.links(rows)}


def targets_table(entries: Sequence[Row]) -> str:
    """What was aimed at, and what came of it."""
    header = ("model", "setting", "what", "plain diffusers", "measured", "faster", "target", "met")
    return markdown(header, (_target_line(row) for row in entries if row["target"] is not None))


def _target_line(row: Row) -> list[str]:
    unit = f" {row['unit']}".rstrip()
    value, plain = row["value"], row["plain_diffusers"] if row["unit"] else None
    name, _, fallback = row["setting"].partition(" ")
    return [
        row["model"],
        f"`{name}` {fallback}".rstrip(),
        row["metric"],
        "–" if plain is None else f"{plain:.4g}{unit}",
        "not measured" if value is None else f"**{value:.4g}**{unit}",
        f"{plain / value:.2f}×" if value and plain else "–",
        f"≤ {row['target']:g}{unit}",
        {True: "yes", False: "no", None: "–"}[row["met"]],
    ]


def _machine(rows: Sequence[Measured]) -> str:
    """What the newest measurement was taken on."""
    content = next((one.content for one in rows if one.done), None)
    if content is None:
        return "*Not measured yet.*"
    state, versions, device = content["before"], content["versions"], "CPU"
    libraries = ", ".join(f"{name} {versions[name]}" for name in LIBRARIES if versions.get(name))
    if "name" in state:
        device = f"{state['name']}, driver {state['driver_version']}, power limit {state['power.limit']} W"
    return f"{device}; {libraries}; commit {str(versions.get('git_commit'))[:9]}."
