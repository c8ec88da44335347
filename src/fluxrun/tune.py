"""``fluxrun tune``: find the fastest options that keep the picture, by measuring, and write them as a preset.

Options are tried group by group on top of the best so far: attention kernels first, because they need no compiling,
then ways of compiling, then number formats and step caches, which pay only together with compiling. What would fall
back here is left out before anything is loaded.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fluxrun.baseline import neutral_data, option_data
from fluxrun.catalog import Catalog
from fluxrun.comparing import compare
from fluxrun.compose import compose
from fluxrun.config import GROUPS, RunConfig
from fluxrun.errors import ConfigError, FluxrunError, Interrupted, one_line
from fluxrun.interrupt import Interrupts
from fluxrun.record import write_atomically, write_failure
from fluxrun.rerun import log_to
from fluxrun.results import NEUTRAL, Row, read_row, read_rows
from fluxrun.summary import Progress, finish
from fluxrun.table import decibels, seconds
from fluxrun.workbench import Workbench

log = logging.getLogger("fluxrun.tune")

SEARCHED = ("attention", "compile", "quantization", "cache")
"""The groups that are searched, in this order; the others stay as they are configured."""
LONG = ("max_autotune", "max_autotune_no_cudagraphs")
"""Options whose first image may take minutes: only with ``--thorough``."""
WORTH = 0.02
"""A gain in speed below this share is noise: the simpler option stays."""
MOST_STEPS = 8
"""Steps of a measured image when nobody says otherwise: enough to compare, for a model of fifty too."""


@dataclass
class Trial:
    """One option that was tried, or left out: what came of it, in words for the preset."""

    group: str
    name: str
    verdict: str
    row: Row | None = None


@dataclass
class Tuner:
    """The search: the best config so far, and everything tried."""

    data: dict[str, Any]
    dirs: tuple[Path, ...]
    folder: Path
    min_psnr: float
    fixed: frozenset[str]
    thorough: bool
    command: list[str]
    workbench: Workbench = field(default_factory=Workbench)
    trials: list[Trial] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def search(self) -> tuple[Row, Row]:
        """Measure the neutral options, then group by group what is faster; returns the baseline and the best."""
        self.data = neutral_data(self.data, self.dirs)
        baseline = self._measure(self.data, "neutral")
        if baseline.status != "completed" or baseline.image_s is None:
            raise FluxrunError(f"the neutral options could not be measured: {baseline.reason} (see {self.folder})")
        best = baseline
        for group in (g for g in SEARCHED if g in GROUPS and g not in self.fixed):
            best = self._search_group(group, best)
        return baseline, best

    def _search_group(self, group: str, best: Row) -> Row:
        catalog = Catalog(self.dirs)
        self.chosen[group] = best.options[group].effective
        neutral = self.data
        for name in catalog.names(group):
            if name in (*NEUTRAL, "auto"):
                continue
            candidate = {**neutral, group: option_data(catalog, group, name)}
            if reason := self._left_out(group, name, candidate):
                self._note(Trial(group, name, reason))
                continue
            row = self._measure(candidate, *(f"{g}={n}" for g, n in {**self.chosen, group: name}.items()))
            verdict = self._judge(group, row, best)
            self._note(Trial(group, name, verdict or "the fastest so far", row))
            if verdict is None:
                best, self.data, self.chosen[group] = row, candidate, name
        return best

    def _left_out(self, group: str, name: str, candidate: dict[str, Any]) -> str | None:
        """Why an option is not even tried: it would fall back here, or it takes minutes to compile."""
        from fluxrun.runner import prepare

        if name in LONG and not self.thorough:
            return "not tried: its first image may take minutes (--thorough tries it)"
        try:
            choice = prepare(RunConfig.from_dict(candidate, self.dirs)).plan.choices[group]
        except FluxrunError as error:
            return f"not usable here: {one_line(error)}"
        return f"not usable here: {choice.fallbacks[0].reason}" if choice.fallbacks else None

    def _measure(self, data: dict[str, Any], *overrides: str) -> Row:
        """Draw a config's pictures into a folder of their own; a failure is a row too."""
        from fluxrun.runner import run

        folder = self.folder / str(len(list(self.folder.glob("*/run.json"))))
        (folder / ".hydra").mkdir(parents=True)
        # Where the table looks for what a job differs in.
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)), encoding="utf-8")
        try:
            run(RunConfig.from_dict(data, self.dirs), folder, command=self.command, workbench=self.workbench)
        except Interrupted:
            raise
        except Exception as error:  # the option's failure is the finding; its traceback is in the log
            write_failure(folder, data, error)
        return read_row(folder, self.folder)

    def _judge(self, group: str, row: Row, best: Row) -> str | None:
        """Why an option is not taken, or None when it is."""
        if row.status != "completed":
            return f"failed: {row.reason}"
        if row.options[group].fell_back:
            return f"fell back: {row.options[group].fallbacks[0].reason}"
        # The fastest of the repeats: another program on the machine makes single ones slow, never fast.
        assert row.fastest_image_s is not None
        assert best.fastest_image_s is not None
        psnr = self._psnr(row)
        figures = f"{seconds(row.fastest_image_s)} an image, PSNR {decibels(psnr)}"
        if psnr is None or psnr < self.min_psnr:
            return f"{figures}: the picture changes more than {self.min_psnr:g} dB allows"
        if row.fastest_image_s > best.fastest_image_s * (1 - WORTH):
            return f"{figures}: not faster than {seconds(best.fastest_image_s)}"
        return None

    def _psnr(self, row: Row) -> float | None:
        rows = read_rows(self.folder, self.folder)
        if problems := compare(rows, self.folder):
            raise ConfigError(f"tune measures fidelity, and cannot: {problems[0]}")
        return next(found.psnr_db for found in rows if found.job == row.job)

    def _note(self, trial: Trial) -> None:
        self.trials.append(trial)
        log.info("%s=%s: %s", trial.group, trial.name, trial.verdict)

    def finish(self) -> dict[str, Row]:
        """Write the table and the page of everything measured; returns the compared rows by job."""
        progress = Progress("completed", self.command, _now(), time.perf_counter() - self.started, [])
        progress.loads = self.workbench.loads
        return {row.job: row for row in finish(self.folder, progress, "auto").jobs}


def tune(arguments: Sequence[str]) -> int:
    """``fluxrun tune [--min-psnr 30] [--output FILE] [overrides]``: measure what is fastest here, write a preset."""
    given, overrides = _parse(arguments)
    config = compose(overrides)
    stamp = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder = given.folder or Path("outputs") / "tune" / stamp
    output = given.output or folder / f"{config.model.name}_tuned.yaml"
    _check_output(output)
    log_to(folder)
    command = ["fluxrun", "tune", *arguments]
    tuner = Tuner(
        data=_measured(config.source, given.repeats, given.steps or _few_steps(config)),
        dirs=config.config_dirs,
        folder=folder,
        min_psnr=given.min_psnr,
        fixed=frozenset(o.partition("=")[0].partition(".")[0] for o in overrides),
        thorough=given.thorough,
        command=command,
    )
    with Interrupts() as interrupts, interrupts.immediate(), tuner.workbench:
        baseline, best = tuner.search()
    rows = tuner.finish()
    write_atomically(output, preset_text(tuner, config, rows[baseline.job], rows[best.job], output.stem))
    log.info("%s", output.read_text(encoding="utf-8").rstrip())
    log.info("written to %s; run it with: fluxrun %s", output, _use(output, config))
    return 0


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="fluxrun tune", description=tune.__doc__)
    parser.add_argument("--min-psnr", type=float, default=30.0, help="dB that pictures must keep to the neutral ones")
    parser.add_argument("--output", type=Path, help="the preset's YAML file, for example conf/preset/mine.yaml")
    parser.add_argument("--folder", type=Path, help="where the measured runs go (default: outputs/tune/…)")
    parser.add_argument("--repeats", type=int, default=4, help="times each image is drawn; the first is not counted")
    steps = f"steps of a measured image (default: the model's, at most {MOST_STEPS})"
    parser.add_argument("--steps", type=int, help=steps)
    parser.add_argument("--thorough", action="store_true", help="also what may compile for minutes")
    given, overrides = parser.parse_known_args(list(arguments))
    if flags := [o for o in overrides if o.startswith("-")]:
        raise ConfigError(f"fluxrun tune: unknown flag {flags[0]!r} (fluxrun tune --help)")
    if given.repeats < 2:
        raise ConfigError(f"--repeats {given.repeats}: at least 2, the first image is not counted")
    if not given.min_psnr > 0:
        raise ConfigError(f"--min-psnr {given.min_psnr:g}: decibels, more than 0")
    return given, overrides


def _check_output(output: Path) -> None:
    if output.suffix != ".yaml":
        raise ConfigError(f"--output {output}: a preset is a .yaml file")
    if output.exists():
        raise ConfigError(f"--output {output}: there is such a file; remove it or choose another name")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot write there: {error.strerror}") from error


def _few_steps(config: RunConfig) -> int | None:
    """The steps a measured image gets: the model's own, but not fifty of them."""
    own = config.steps or getattr(config.model, "steps", None)
    return min(own, MOST_STEPS) if own and config.steps is None else own


def _measured(source: dict[str, Any], repeats: int, steps: int | None) -> dict[str, Any]:
    return {**source, "steps": steps, "measure": {"warmup": 0, "repeats": repeats}}


# --- the preset -----------------------------------------------------------------------------------------------------


def preset_text(tuner: Tuner, config: RunConfig, baseline: Row, best: Row, name: str) -> str:
    """The preset: overrides, and as comments what justifies each line."""
    groups = [group for group in SEARCHED if group in tuner.chosen]
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
    chosen = tuner.chosen[group]
    lines: list[str] = []
    for trial in (t for t in tuner.trials if t.group == group):
        if trial.name == chosen and trial.row is not None:
            first = f", first one {seconds(trial.row.first_image_s)}" if trial.row.first_image_s else ""
            lines.insert(0, f"{chosen}: {seconds(trial.row.fastest_image_s)} an image{first}")
        elif trial.verdict == "the fastest so far" and trial.row is not None:
            lines.append(f"{trial.name}: {seconds(trial.row.fastest_image_s)} an image, until {chosen}")
        else:
            lines.append(f"{trial.name}: {trial.verdict}")
    return lines


def _where(folder: Path) -> str:
    """Machine and versions of a run, in one line."""
    from fluxrun.record import read_record

    known = read_record(folder).environment
    machine = known.get("gpu") or f"{known.get('cpu')} (CPU)"
    versions = [f"{name} {known[name]}" for name in ("torch", "diffusers", "torchao", "xformers") if known.get(name)]
    driver = [f"driver {known['driver']}"] if known.get("gpu") and known.get("driver") else []
    return ", ".join([str(machine), *driver, *versions, f"fluxrun {known.get('fluxrun')}"])


def _use(output: Path, config: RunConfig) -> str:
    where = f"--config-dir {output.parent.parent} " if output.parent.name == "preset" else ""
    return f"{where}+preset={output.stem} model={config.model.name}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
