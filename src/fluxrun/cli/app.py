"""The command line: a plain Hydra app, a few subcommands, and one line for every error."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from fluxrun.cli.arguments import flags_parser
from fluxrun.config.composition import (
    CONFIG_NAME,
    HYDRA_BASE,
    compose_node,
    config_dirs,
    hydra_for,
    quote_raw_text,
    raise_as_refusal,
    to_run_config,
)
from fluxrun.errors import ConfigError, FluxrunError, exit_code_of, one_line
from fluxrun.formatting import nearest, shorten
from fluxrun.paths import cache_dir, check_folders, conf_dir, expanded
from fluxrun.planning.prepare import prepare
from fluxrun.process.console import console, one_line_warning
from fluxrun.runner import run
from fluxrun.sweep.run import Sweep, plan_sweep
from fluxrun.trust import TRUST_VARIABLE
from fluxrun.version import __version__

TRUST_FLAG = "--trust-config"

SUBCOMMANDS = {
    "plan": "fluxrun.cli.plan",
    "doctor": "fluxrun.cli.doctor",
    "rerun": "fluxrun.cli.rerun",
    "eval": "fluxrun.cli.evaluate",
    "report": "fluxrun.cli.report",
    "tune": "fluxrun.cli.tune",
}
"""The module of each subcommand, imported when it is asked for: a typo must not wait for all of them."""

SHOWING_FLAGS = ("help", "hydra_help", "cfg", "info", "shell_completion")

log = logging.getLogger("fluxrun")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``fluxrun``; ends the process with the exit code of DESIGN (0, 1, 2, 130, 143)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = one_line_warning  # type: ignore[assignment]
    try:
        check_folders()
        code = dispatch(arguments)
    except KeyboardInterrupt:
        code = _say("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except FluxrunError as error:
        code = _say(str(error), error.exit_code, error)
    except Exception as error:  # the last resort: a mistake of fluxrun's own is one line as well
        code = _say(f"{type(error).__name__}: {one_line(error)} (traceback in {_refusals()})", 1, error)
    sys.exit(code)


def dispatch(arguments: list[str]) -> int:
    """Run the subcommand named by a bare first word, else the Hydra app; returns the exit code."""
    if TRUST_FLAG in arguments:
        arguments = [a for a in arguments if a != TRUST_FLAG]
        os.environ[TRUST_VARIABLE] = "1"
    if arguments[:1] == ["--version"]:
        print(f"fluxrun {__version__}")
        return 0
    first = arguments[0] if arguments else ""
    if first in SUBCOMMANDS:
        command: Callable[[list[str]], int] = import_module(SUBCOMMANDS[first]).command
        return command(arguments[1:])
    if first and not first.startswith("-") and "=" not in first and not first.startswith(("+", "~")):
        raise ConfigError(
            f"unknown command {shorten(first)!r}: {nearest(first, list(SUBCOMMANDS))}, or overrides (key=value)"
        )
    return run_app([quote_raw_text(a) for a in arguments])


# --- the Hydra app ------------------------------------------------------------------------------------------------


def run_app(arguments: list[str]) -> int:
    """The Hydra app: ``--cfg``, ``--help``, ``--multirun``, completion and runs. Bad input is refused first."""
    options = flags_parser("fluxrun").parse_args(arguments)
    if options.shell_completion and not options.config_dir:
        arguments = [*arguments, *_config_dir_of_line(os.environ.get("COMP_LINE", "").split())]
    dirs = config_dirs(options.config_dir)
    _check_flags(options.config_path or options.config_name, options.experimental_rerun)
    if not any(getattr(options, flag) for flag in SHOWING_FLAGS):
        sweep = _refuse_early(options.overrides, dirs, multirun=options.multirun)
        if sweep is not None:
            flags = [a for a in arguments if a not in options.overrides and a not in ("-m", "--multirun")]
            return sweep.run(lambda ours, task: _run_hydra(["--multirun", *flags, *ours], ours, dirs, task))
    elif not options.shell_completion:
        # Hydra runs callbacks even when it only shows a config, so the trust rule comes first here too.
        with hydra_for(dirs) as app:
            compose_node(app, options.overrides, dirs, RunMode.MULTIRUN if options.multirun else RunMode.RUN)
    codes: list[int] = []
    _run_hydra(arguments, options.overrides, dirs, lambda node: codes.append(_job(node, dirs)))
    return max(codes, default=0)


def _config_dir_of_line(words: list[str]) -> list[str]:
    """``--config-dir`` of the line that is being completed: Hydra's shell script does not hand it on."""
    pairs = pairwise(words)
    folder = next((value for flag, value in pairs if flag in ("--config-dir", "-cd")), "")
    return ["--config-dir", str(expanded(folder))] if folder and os.path.isdir(expanded(folder)) else []


def _check_flags(other_config: str | None, pickled: str | None) -> None:
    if pickled:
        raise ConfigError("--experimental-rerun is not used: it unpickles a file, which runs code; see fluxrun rerun")
    if other_config:
        raise ConfigError(
            "--config-path and --config-name are not used: fluxrun has one config; add yours with --config-dir"
        )


def _refuse_early(overrides: Sequence[str], dirs: tuple[Path, ...], *, multirun: bool) -> Sweep | None:
    """Everything that can be refused before Hydra makes a folder and before torch is imported; the sweep, if it is one.

    In a sweep only what is wrong for every job: a value that one job has wrong fails that job.
    """
    multirun = multirun or any(o.lstrip("+").startswith("sweep=") for o in overrides)  # a sweep's file is a multirun
    with hydra_for(dirs) as app:
        node = compose_node(app, overrides, dirs, RunMode.MULTIRUN if multirun else RunMode.RUN)
        if multirun or node.hydra.mode == RunMode.MULTIRUN:
            return plan_sweep(app, node, overrides, dirs)
    if stray := next((o for o in overrides if o.lstrip("+~").startswith("sweep.")), None):
        raise ConfigError(f"{stray}: the sweep keys belong to a sweep; add --multirun, or +sweep=NAME")
    prepare(to_run_config(node, dirs))
    _refuse_used_folder(node)
    return None


def _refuse_used_folder(node: DictConfig) -> None:
    folder = Path(str(node.hydra.run.dir))
    if os.path.exists(folder / "run.json"):
        raise ConfigError(f"{folder} already holds a run: choose another hydra.run.dir, or remove it")


def _run_hydra(
    arguments: list[str], overrides: Sequence[str], dirs: tuple[Path, ...], task: Callable[[DictConfig], Any]
) -> None:
    """Hand over to Hydra; its own errors come back as one line (HYDRA_FULL_ERROR makes it raise them)."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *arguments]
    app = hydra.main(version_base=HYDRA_BASE, config_path=str(conf_dir()), config_name=CONFIG_NAME)(task)
    try:
        app()
    except OSError as error:
        raise ConfigError(f"cannot write to the output folder {error.filename}: {error.strerror}") from error
    except Exception as error:
        raise_as_refusal(error, overrides, dirs)


def _job(node: DictConfig, dirs: tuple[Path, ...]) -> int:
    """One job of the app: run it in the folder Hydra made; returns its exit code, never raises an ordinary error."""
    hydra_config: Any = HydraConfig.get()
    try:
        config = to_run_config(_with_hydra(node, hydra_config), dirs)
        run(config, hydra_config.runtime.output_dir, command=["fluxrun", *sys.argv[1:]])
    except KeyboardInterrupt:
        return 130
    except FluxrunError as error:
        log.debug("refused", exc_info=error)
        if error.exit_code not in (130, 143) and not _recorded(hydra_config):
            log.error("%s", error)
        return error.exit_code
    except Exception as error:  # already one line on screen and a traceback in the log
        log.debug("failed", exc_info=error)
        return exit_code_of(error)
    return 0


def _with_hydra(node: DictConfig, hydra_config: DictConfig) -> DictConfig:
    from omegaconf import open_dict

    copy = node.copy()
    with open_dict(copy):
        copy.hydra = {"runtime": {"choices": dict(hydra_config.runtime.choices)}}
    return copy


def _recorded(hydra_config: DictConfig) -> bool:
    return (Path(hydra_config.runtime.output_dir) / "run.json").exists()


def _say(line: str, code: int, error: BaseException | None = None) -> int:
    """One line on the screen; the traceback goes to the log in the cache folder."""
    console.print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    if error is not None:
        _log_refusal(error)
    return code


def _refusals() -> Path:
    return cache_dir() / "refused.log"


def _log_refusal(error: BaseException) -> None:
    """Keep the traceback of the last refusals in the user's cache folder: no run folder exists yet."""
    import traceback

    path = _refusals()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError as problem:
        log.debug("could not write %s: %s", path, one_line(problem))
