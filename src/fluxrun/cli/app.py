"""The command line: a plain Hydra app, a few subcommands, and one line for every error."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from hydra._internal.hydra import Hydra
from hydra.types import RunMode

from fluxrun.cli.arguments import flags_parser
from fluxrun.config.composition import CONFIG_NAME, compose_node, config_dirs, hydra_errors, hydra_for, quote_raw_text
from fluxrun.errors import ConfigError, FluxrunError, one_line
from fluxrun.formatting import nearest, shorten, utf8
from fluxrun.hardware.detection import place
from fluxrun.paths import cache_dir, check_folders
from fluxrun.process import spans
from fluxrun.process.console import console, one_line_warning
from fluxrun.process.signals import Interrupts
from fluxrun.streams import drop, lasting
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
    "calibrate": "fluxrun.cli.calibrate",
    "quantize": "fluxrun.cli.quantize",
    "serve": "fluxrun.cli.serve",
}
"""The module of each subcommand, imported when it is asked for: a typo must not wait for all of them."""

SHOWING_FLAGS = ("help", "hydra_help", "cfg", "info", "shell_completion")

ONE_OF = ("run", "multirun", "cfg", "info", "shell_completion")
"""Flags of which only one can be given."""

log = logging.getLogger("fluxrun")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``fluxrun``; ends the process with the exit code of DESIGN (0, 1, 2, 129, 130, 143)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = one_line_warning
    if (here := place()) is not None and here.rank > 0:
        console.quiet = True  # the first of torchrun's processes speaks
    with lasting("stderr"), Interrupts() as interrupts:
        try:
            with interrupts.immediate():
                check_folders()
                code = dispatch(arguments)
        except KeyboardInterrupt:
            interrupted = interrupts.error()
            code = _say(str(interrupted), interrupted.exit_code)
        except BrokenPipeError:
            drop(sys.stdout)
            code = 1
        except FluxrunError as error:
            code = _say(str(error), error.exit_code, error)
        except Exception as error:  # the last resort: a mistake of fluxrun's own is one line as well
            code = _unexpected(error)
        code = _flushed(code)
    sys.exit(code)


def _unexpected(error: Exception) -> int:
    """Say what nobody foresaw; its traceback is kept."""
    if isinstance(error, OSError) and error.filename is None:
        drop(sys.stdout)
        return _say(f"cannot write to standard output: {error.strerror}", 1, error)
    return _say(f"{type(error).__name__}: {one_line(error)} (traceback in {_refusals()})", 1, error)


def _flushed(code: int) -> int:
    """The exit code once all of standard output is out: a table that nobody got is no success."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        drop(sys.stdout)
        return code or _say(f"cannot write to standard output: {error.strerror}", 1)
    return code


def dispatch(arguments: list[str]) -> int:
    """Run the subcommand named by a bare first word, else the Hydra app; returns the exit code."""
    typed = arguments
    if TRUST_FLAG in arguments:
        arguments = [a for a in arguments if a != TRUST_FLAG]
        os.environ[TRUST_VARIABLE] = "1"
    if arguments[:1] == ["--version"]:
        print(f"fluxrun {__version__}")
        return 0
    _refuse_other_encodings(arguments)
    first = arguments[0] if arguments else ""
    if first in SUBCOMMANDS:
        command: Callable[[list[str]], int] = import_module(SUBCOMMANDS[first]).command
        return command(arguments[1:])
    if first and not first.startswith("-") and "=" not in first and not first.startswith(("+", "~")):
        raise ConfigError(
            f"unknown command {shorten(first)!r}: {nearest(first, list(SUBCOMMANDS))}, or overrides (key=value)"
        )
    return run_app([quote_raw_text(a) for a in arguments], typed)


def _refuse_other_encodings(arguments: Sequence[str]) -> None:
    """Records, logs and pictures hold their texts and paths as UTF-8."""
    if wrong := next((text for text in [*arguments, os.getcwd()] if text != utf8(text)), None):
        raise ConfigError(f"{utf8(wrong)} is not UTF-8: give the file or folder another name, or a link with one")


# --- the Hydra app ------------------------------------------------------------------------------------------------


def run_app(arguments: Sequence[str], typed: Sequence[str]) -> int:
    """The Hydra app: ``--cfg``, ``--help``, ``--multirun``, completion and runs. Bad input is refused first.

    ``arguments`` are what was ``typed``, with raw text quoted. Hydra's own ``main`` would read them from ``sys.argv``,
    once more, and compose with the user's folders after fluxrun's own.
    """
    spans.begin("compose")
    parser = flags_parser("fluxrun")
    options = parser.parse_args(arguments)
    if options.shell_completion and not options.config_dir:
        options.config_dir = _config_dir_of_line(os.environ.get("COMP_LINE", "").split())
    dirs = config_dirs(options.config_dir)
    _check_flags(options)
    with hydra_for(dirs) as app:
        if any(getattr(options, flag) for flag in SHOWING_FLAGS):
            return _show(app, options, parser, dirs)
        return _draw(app, options, dirs, ["fluxrun", *arguments], ["fluxrun", *typed])


def _draw(app: Hydra, options: Namespace, dirs: tuple[Path, ...], command: Sequence[str], typed: Sequence[str]) -> int:
    overrides = options.overrides
    multirun = options.multirun or any(o.lstrip("+").startswith("sweep=") for o in overrides)  # its file is a multirun
    node = compose_node(app, overrides, dirs, RunMode.MULTIRUN if multirun else RunMode.RUN)
    # Only now: a typo must not wait for the import of all that draws.
    if multirun or node.hydra.mode == RunMode.MULTIRUN:
        with spans.span("import"):
            from fluxrun.startup.lean import ANY_OF_THEM, start_lean
            from fluxrun.sweep.planning import plan_sweep

        with console.status("looking at the options of the sweep"):
            sweep = plan_sweep(app, node, overrides, dirs, typed)
        start_lean(ANY_OF_THEM if len(dirs) == 1 else None)  # a folder of the user's may hold options of their own
        spans.end("compose")
        return sweep.run(app)
    with spans.span("import"):
        from fluxrun.cli.draw import draw_run

    return draw_run(app, node, overrides, dirs, command)


def _show(app: Hydra, options: Namespace, parser: ArgumentParser, dirs: tuple[Path, ...]) -> int:
    """What Hydra shows of itself and of the config, without running anything."""
    overrides = options.overrides
    if options.shell_completion:
        with hydra_errors(overrides, dirs):
            app.shell_completion(CONFIG_NAME, overrides)
        return 0
    # Hydra runs callbacks even when it only shows a config, so the trust rule comes first here too.
    compose_node(app, overrides, dirs, RunMode.MULTIRUN if options.multirun else RunMode.RUN)
    with hydra_errors(overrides, dirs):
        if options.help:
            app.app_help(CONFIG_NAME, parser, options)
        elif options.hydra_help:
            app.hydra_help(CONFIG_NAME, parser, options)
        elif options.cfg:
            app.show_cfg(CONFIG_NAME, overrides, options.cfg, options.package, options.resolve)
        else:
            app.show_info(options.info, CONFIG_NAME, overrides)
    return 0


def _config_dir_of_line(words: list[str]) -> str | None:
    """``--config-dir`` of the line that is being completed: Hydra's shell script does not hand it on."""
    folder = next((value for flag, value in pairwise(words) if flag in ("--config-dir", "-cd")), "")
    return folder if folder and Path(folder).expanduser().is_dir() else None


def _check_flags(options: Namespace) -> None:
    if options.config_path or options.config_name:
        raise ConfigError(
            "--config-path and --config-name are not used: fluxrun has one config; add yours with --config-dir"
        )
    if options.experimental_rerun:
        raise ConfigError("--experimental-rerun is not used: it unpickles a file, which runs code; see fluxrun rerun")
    if options.resolve and not (options.cfg or options.help):
        raise ConfigError("--resolve only goes with --cfg or --help")
    modes = [f"--{flag.replace('_', '-')}" for flag in ONE_OF if getattr(options, flag)]
    if len(modes) > 1:
        raise ConfigError(f"{' and '.join(modes)} do not go together")


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
        path.write_text(utf8("".join(traceback.format_exception(error))), encoding="utf-8")
    except OSError as problem:
        log.debug("could not write %s: %s", path, one_line(problem))
