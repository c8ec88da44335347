"""The preset that ``fluxrun tune`` writes: overrides, and as comments the figures that justify each line."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path

from fluxrun.config.schema import RunConfig
from fluxrun.formatting import decibels, seconds
from fluxrun.record.folder import read_record
from fluxrun.report.rows import Row
from fluxrun.sweep.trials import together
from fluxrun.sweep.tuner import Tuner


def preset_text(tuner: Tuner, config: RunConfig, baseline: Row, best: Row, name: str) -> str:
    """The whole file; a group of which nothing was tried is not in it."""
    groups = dict.fromkeys(trial.group for trial in tuner.trials)
    lines = [
        "# @package _global_",
        f"# fluxrun +preset={name} model={config.model.name}",
        f"# Found on {datetime.now(UTC):%Y-%m-%d} by: {shlex.join(tuner.command)}",
        f"# {_where(tuner.folder / best.folder)}",
        *_figures(tuner, baseline, best),
        "defaults:",
    ]
    for group in groups:
        lines.append(f"  - override /{group}: {tuner.chosen[group]}")
        lines += [f"    # {line}" for line in _why(tuner, group)]
    return "\n".join(lines) + "\n"


def use(output: Path, config: RunConfig) -> str:
    """The arguments with which the preset is run."""
    where = f"--config-dir {output.parent.parent} " if output.parent.name == "preset" else ""
    return f"{where}+preset={output.stem} model={config.model.name}"


def _figures(tuner: Tuner, baseline: Row, best: Row) -> list[str]:
    height, width = best.size
    assert baseline.fastest_image_s is not None
    assert best.fastest_image_s is not None
    pays = f"; pays for its first image after {best.pays_after}" if best.pays_after and best.pays_after > 1 else ""
    return [
        f"# {best.model}, {width}x{height}, {best.steps} step(s): {seconds(best.fastest_image_s)} an image instead of "
        f"{seconds(baseline.fastest_image_s)} ({baseline.fastest_image_s / best.fastest_image_s:.2f}x),",
        f"# {seconds(best.step_s)} a step instead of {seconds(baseline.step_s)}; PSNR to the neutral options "
        f"{decibels(best.psnr_db)} (at least {tuner.min_psnr:g} asked for){pays}.",
    ]


def _why(tuner: Tuner, group: str) -> list[str]:
    """What is said of a group's options: the chosen one first, equal reasons once."""
    trials = [trial for trial in tuner.trials if trial.group == group]
    measured = [trial for trial in trials if trial.row is not None]
    lines = []
    for trial in sorted(measured, key=lambda t: t.name != tuner.chosen[group]):
        until = f", until {tuner.chosen[group]}" if trial.taken and trial.name != tuner.chosen[group] else ""
        lines.append(f"{trial.name}: {trial.verdict}{until}")
    left_out = together([trial for trial in trials if trial.row is None])
    return lines + [f"{', '.join(names)}: {reason}" for reason, names in left_out.items()]


def _where(folder: Path) -> str:
    """Machine and versions of a run, in one line."""
    known = read_record(folder).environment
    machine = known.get("gpu") or f"{known.get('cpu')} (CPU)"
    versions = [f"{name} {known[name]}" for name in ("torch", "diffusers", "torchao", "xformers") if known.get(name)]
    driver = [f"driver {known['driver']}"] if known.get("gpu") and known.get("driver") else []
    return ", ".join([str(machine), *driver, *versions, f"fluxrun {known.get('fluxrun')}"])
