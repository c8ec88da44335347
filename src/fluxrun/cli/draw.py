"""What a composed command line does: one run, or a sweep; what can be refused is refused before any folder is made."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig

from fluxrun.config.composition import CONFIG_NAME, hydra_errors, to_data
from fluxrun.config.schema import RunConfig
from fluxrun.errors import ConfigError, FluxrunError, Interrupted, exit_code_of, is_said, one_line
from fluxrun.planning.prepare import prepare
from fluxrun.record.folder import claimed
from fluxrun.runner import run
from fluxrun.streams import lasting

log = logging.getLogger("fluxrun")


def draw_run(
    app: Hydra, node: DictConfig, overrides: Sequence[str], dirs: tuple[Path, ...], command: Sequence[str]
) -> int:
    """Check one run's config, then let Hydra make its folder and call the job in it; returns the exit code."""
    if stray := next((o for o in overrides if o.lstrip("+~").startswith("sweep.")), None):
        raise ConfigError(f"{stray}: the sweep keys belong to a sweep; add --multirun, or +sweep=NAME")
    prepare(RunConfig.from_dict(to_data(node), dirs))
    folder = Path(str(node.hydra.run.dir))
    # Composed once more, the folder would be that of another moment.
    rest = [o for o in overrides if not o.startswith("hydra.run.dir=")]
    pinned = f"hydra.run.dir={QuotedString(str(folder), Quote.single).with_quotes()}"
    job = functools.partial(_job, dirs=dirs, command=command)
    with lasting("stdout"), claimed(folder), hydra_errors(overrides, dirs):
        return int(app.run(CONFIG_NAME, job, [*rest, pinned, "hydra.mode=RUN"]).return_value)


def _job(node: DictConfig, dirs: tuple[Path, ...], command: Sequence[str]) -> int:
    """The run, in the folder Hydra made; returns its exit code, never raises an ordinary error."""
    hydra: Any = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    try:
        run(RunConfig.from_dict(to_data(node, hydra.runtime.choices), dirs), folder, command=command)
    except KeyboardInterrupt:
        return 130
    except FluxrunError as error:
        log.debug("refused", exc_info=error)
        if not (isinstance(error, Interrupted) or is_said(error) or (folder / "run.json").exists()):
            log.error("%s", error)
        return error.exit_code
    except Exception as error:  # already one line on screen and a traceback in the log
        log.debug("failed", exc_info=error)
        if not (is_said(error) or (folder / "run.json").exists()):
            log.error("%s: %s", type(error).__name__, one_line(error))
        return exit_code_of(error)
    return 0
