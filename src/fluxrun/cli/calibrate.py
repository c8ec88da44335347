"""``fluxrun calibrate``: what MagCache must know of a model, measured and written as an option file."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fluxrun.atomic import write_atomically
from fluxrun.cli.arguments import one_line_parser
from fluxrun.cli.rerun import output_dir
from fluxrun.config.catalog import Catalog
from fluxrun.config.composition import compose
from fluxrun.config.schema import RunConfig
from fluxrun.errors import ConfigError
from fluxrun.paths import expanded
from fluxrun.process.console import log_to
from fluxrun.record.claiming import claimed
from fluxrun.record.schema import RunRecord
from fluxrun.runner import run

log = logging.getLogger("fluxrun.calibrate")

TARGET = "fluxrun.options.cache.MagCalibration"


def command(arguments: Sequence[str]) -> int:
    """``fluxrun calibrate [--output FILE.yaml] [overrides]``: measure a model's ratios for ``cache=magcache``.

    Draws the prompts with every step computed, and writes an option file: in a folder ``cache`` of a ``--config-dir``
    it is an option of its own. The ratios belong to the model, its scheduler and about this number of steps.
    """
    options, overrides = _parse(arguments)
    file = expanded(options.output)
    if file.suffix != ".yaml" or file.exists():
        raise ConfigError(f"--output {file}: " + ("is there already" if file.exists() else "expected a .yaml file"))
    own = [override for override in overrides if not override.startswith("hydra.run.dir=")]
    folder = output_dir([override for override in overrides if override.startswith("hydra.run.dir=")])
    config = _calibrating(compose([*own, "cache=none", "compile=none"]))
    with claimed(folder):
        log_to(folder)
        record = run(config, folder, command=["fluxrun", "calibrate", *arguments])
    ratios = record.options["cache"].facts["ratios"]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, option_file(record, ratios, own))
    where = f"--config-dir {file.parent.parent} " if file.parent.name == "cache" else ""
    log.info("%d ratios in %s: fluxrun %scache=%s %s", len(ratios), file, where, file.stem, " ".join(own))
    return 0


def option_file(record: RunRecord, ratios: Sequence[float], overrides: Sequence[str]) -> str:
    """An option of the ``cache`` group with these ratios, and where they come from."""
    images = len(record.images)
    lines = [
        f"# MagCache for {record.config['model']['name']}, {len(ratios)} steps.",
        f"# Measured on {datetime.now(UTC):%Y-%m-%d} over {images} picture(s): fluxrun calibrate {' '.join(overrides)}",
    ]
    knobs: dict[str, Any] = {**Catalog().data("cache", "magcache"), "ratios": list(ratios)}
    del knobs["name"]
    return "\n".join(lines) + "\n" + yaml.safe_dump(knobs, sort_keys=False, default_flow_style=None, width=110)


def _calibrating(config: RunConfig) -> RunConfig:
    cache = {"_target_": TARGET, "name": "calibration"}
    return RunConfig.from_dict({**config.source, "cache": cache}, config.config_dirs)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = one_line_parser("calibrate", command.__doc__)
    parser.add_argument("--output", type=Path, default=Path("conf/cache/magcache_calibrated.yaml"), help="the file")
    options, overrides = parser.parse_known_args(list(arguments))
    if flags := [override for override in overrides if override.startswith("-")]:
        raise ConfigError(f"fluxrun calibrate: unknown flag {flags[0]!r}; allowed: --output FILE.yaml, and overrides")
    return options, overrides
