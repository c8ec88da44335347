"""``fluxrun tune``: measure what is fastest here, and write it as a preset."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fluxrun.atomic import write_atomically
from fluxrun.cli.arguments import one_line_parser
from fluxrun.config.composition import compose
from fluxrun.config.schema import RunConfig
from fluxrun.errors import ConfigError, Interrupted
from fluxrun.process.console import log_to
from fluxrun.process.signals import Interrupts
from fluxrun.sweep.tuned_preset import preset_text, use
from fluxrun.sweep.tuner import MOST_STEPS, Tuner, log
from fluxrun.types import JsonObject


def command(arguments: Sequence[str]) -> int:
    """``fluxrun tune [--min-psnr 30] [--output FILE] [overrides]``: measure what is fastest here, write a preset."""
    given, overrides = _parse(arguments)
    config = compose(overrides, config_dir=given.config_dir)
    folder = given.folder or Path("outputs") / "tune" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    output = given.output or folder / f"{config.model.name}_tuned.yaml"
    _check_folder(folder)
    _check_output(output)
    log_to(folder)
    tuner = Tuner(
        data=_measured(config.source, given.repeats, given.steps or _few_steps(config)),
        dirs=config.config_dirs,
        folder=folder,
        min_psnr=given.min_psnr,
        fixed=frozenset(o.partition("=")[0].partition(".")[0].lstrip("+") for o in overrides),
        thorough=given.thorough,
        minutes=given.minutes,
        command=["fluxrun", "tune", *arguments],
    )
    try:
        with Interrupts() as interrupts, interrupts.immediate(), tuner.pool:
            baseline, best = tuner.search()
    except (KeyboardInterrupt, Interrupted):
        if list(folder.glob("*/run.json")):
            tuner.finish("interrupted")
        raise
    rows = tuner.finish()
    write_atomically(output, preset_text(tuner, config, rows[baseline.job], rows[best.job], output.stem))
    log.info("%s", output.read_text(encoding="utf-8").rstrip())
    log.info("written to %s; run it with: fluxrun %s", output, use(output, config))
    return 0


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = one_line_parser("tune", command.__doc__)
    parser.add_argument("--min-psnr", type=float, default=30.0, help="dB that pictures must keep to the neutral ones")
    parser.add_argument("--output", type=Path, help="the preset's YAML file, for example conf/preset/mine.yaml")
    parser.add_argument("--folder", type=Path, help="where the measured runs go (default: outputs/tune/…)")
    parser.add_argument("--repeats", type=int, default=4, help="times each image is drawn; the first is not counted")
    steps = f"steps of a measured image (default: the model's, at most {MOST_STEPS})"
    parser.add_argument("--steps", type=int, help=steps)
    minutes = "after so many, no further option is begun (default: 15)"
    parser.add_argument("--minutes", type=float, default=15.0, help=minutes)
    parser.add_argument("--thorough", action="store_true", help="also what may compile for minutes")
    parser.add_argument("--config-dir", "-cd", help="your own options, searched too")
    given, overrides = parser.parse_known_args(list(arguments))
    if flags := [o for o in overrides if o.startswith("-")]:
        raise ConfigError(f"fluxrun tune: unknown flag {flags[0]!r} (fluxrun tune --help)")
    _check_numbers(given)
    return given, overrides


def _check_numbers(given: argparse.Namespace) -> None:
    if given.repeats < 2:
        raise ConfigError(f"--repeats {given.repeats}: at least 2, the first image is not counted")
    if not given.min_psnr > 0:
        raise ConfigError(f"--min-psnr {given.min_psnr:g}: decibels, more than 0")
    if given.steps is not None and given.steps < 1:
        raise ConfigError(f"--steps {given.steps}: at least 1")
    if not given.minutes > 0:
        raise ConfigError(f"--minutes {given.minutes:g}: more than 0")


def _check_folder(folder: Path) -> None:
    if os.path.isdir(folder) and list(folder.glob("*/run.json")):
        raise ConfigError(f"--folder {folder}: there are runs in it already; remove it or choose another one")


def _check_output(output: Path) -> None:
    if output.suffix != ".yaml":
        raise ConfigError(f"--output {output}: a preset is a .yaml file")
    if os.path.exists(output):
        raise ConfigError(f"--output {output}: there is such a file; remove it or choose another name")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
        output.unlink()  # not after a quarter of an hour of measuring
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot write there: {error.strerror}") from error


def _few_steps(config: RunConfig) -> int | None:
    """The steps a measured image gets: the model's own, but not fifty of them."""
    own = config.steps or getattr(config.model, "steps", None)
    return min(own, MOST_STEPS) if own and config.steps is None else own


def _measured(source: JsonObject, repeats: int, steps: int | None) -> dict[str, Any]:
    return {**source, "steps": steps, "measure": {"warmup": 0, "repeats": repeats}}
