"""What the commands' argument parsers share: Hydra's own flags, and one line for what is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from fluxrun.errors import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line instead of a usage of several."""

    def error(self, message: str) -> NoReturn:
        """Refuse what was typed; raises ConfigError."""
        raise ConfigError(f"{message} ({self.prog} --help lists what there is)")


def one_line_parser(name: str, about: str | None) -> OneLineParser:
    """The parser of a subcommand's own flags."""
    return OneLineParser(prog=f"fluxrun {name}", description=about)


def flags_parser(prog: str) -> argparse.ArgumentParser:
    """Hydra's own parser of flags; an unknown one is one line instead of argparse's usage."""

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message} ({prog} --help lists what there is)")

    parser = get_args_parser()
    parser.prog = prog
    parser.error = refuse  # type: ignore[method-assign]  # on Hydra's parser, made by Hydra
    return parser


def composed_from(name: str, about: str | None, arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Overrides and ``--config-dir`` of a subcommand that composes a config; ``--help`` prints ``about`` and ends."""
    options = flags_parser(f"fluxrun {name}").parse_args(list(arguments))
    if options.help:
        print(about)
        sys.exit(0)
    return list(options.overrides), options.config_dir
