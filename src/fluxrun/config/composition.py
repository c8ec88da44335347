"""Composition: YAML groups and overrides, through Hydra, into one typed run config; every error in one line."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import version
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fluxrun.config.catalog import Catalog
from fluxrun.config.files import COMPOSE_ERRORS, HYDRA_BASE, check_defaults, search_path
from fluxrun.config.origin import CheckingLoader
from fluxrun.config.schema import (
    BESIDE_A_RUN,
    GROUPS,
    CommandConfig,
    RayConfig,
    RunConfig,
    SweepConfig,
    command_config,
    workers_config,
)
from fluxrun.errors import ConfigError, one_line, python_reason, raised_by_fluxrun
from fluxrun.formatting import nearest, shorten
from fluxrun.paths import conf_dir, expanded

CONFIG_NAME = "config"

RAW_TEXT_KEYS = ("prompt", "negative_prompt", "sweep.baseline")

QUOTING = " (quote the value, or escape , = ( ) [ ] { } with a backslash)"

LORA_FILES = (
    "lora chooses an option, none or adapters; its files are a knob: "
    "lora=adapters 'lora.files=[{path: FILE.safetensors, scale: 0.8}]'"
)
"""``lora=[…]`` is a list of option names to Hydra."""

HINTS = {
    "Ambiguous value": ": several values are a sweep, which needs --multirun",
    "no viable alternative": QUOTING,
    "mismatched input": QUOTING,
    "extraneous input": QUOTING,
}
"""What to do about an error of Hydra's, by a part of its text."""


def quote_raw_text(override: str) -> str:
    """Quote ``prompt=…`` so that Hydra's grammar and OmegaConf hand the text on unchanged.

    Only ``prompt=[…]`` stays as it is, a list in Hydra's grammar; other overrides pass through.
    """
    key, equals, text = override.partition("=")
    if not equals or key.lstrip("+") not in RAW_TEXT_KEYS:
        return override
    if (text.startswith("[") and text.endswith("]")) or text == "null":
        return override
    return f"{key}={QuotedString(escape_interpolation(text), Quote.single).with_quotes()}"


def escape_interpolation(text: str) -> str:
    """OmegaConf reads ``${`` as an interpolation; a backslash before it (doubling those already there) stops that."""
    return re.sub(r"(\\*)\$\{", lambda match: match.group(1) * 2 + r"\${", text)


def compose(overrides: Sequence[str] = (), *, config_dir: Path | str | None = None) -> RunConfig:
    """The run config of a list of Hydra overrides, as on the command line.

    Raises ConfigError (one line) for unknown keys, options and wrong types, TrustError for untrusted files.
    """
    dirs = config_dirs(config_dir)
    with hydra_for(dirs) as hydra:
        node = compose_node(hydra, [quote_raw_text(o) for o in overrides], dirs)
    _refuse_how(node)
    return to_run_config(node, dirs)


def _refuse_how(node: DictConfig) -> None:
    """Refuse keys that say how the command draws, and would mean nothing in a config of one run."""
    resumed, crew = command_config(node).resume, workers_config(node)
    if resumed is not None or crew is not None:
        key = f"workers={crew.workers}" if crew else f"resume={resumed}"
        raise ConfigError(
            f"{key} is for the fluxrun command that draws, not for a subcommand or a config: leave it out"
        )


def config_dirs(config_dir: Path | str | None = None) -> tuple[Path, ...]:
    """The search order of config folders; raises ConfigError for a folder that is not there."""
    if config_dir is None:
        return (conf_dir(),)
    folder = Path(os.path.realpath(expanded(config_dir)))
    if not os.path.isdir(folder):
        raise ConfigError(f"config folder {folder} does not exist (--config-dir)")
    return (folder, conf_dir())


@contextlib.contextmanager
def hydra_for(dirs: tuple[Path, ...]) -> Iterator[Hydra]:
    """A Hydra over these config folders; the one that was active before is active again afterwards."""
    version.setbase(HYDRA_BASE)  # as the app does: else a composition would mean something else outside of it
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    hydra = Hydra("fluxrun", CheckingLoader(search_path(dirs)))
    GlobalHydra.instance().initialize(hydra)
    try:
        yield hydra
    finally:
        GlobalHydra.instance().clear()
        if before is not None:
            GlobalHydra.instance().initialize(before)


def compose_node(
    hydra: Hydra, overrides: Sequence[str], dirs: tuple[Path, ...], mode: RunMode = RunMode.RUN
) -> DictConfig:
    """Compose with the hydra node in it; every file taking part passes the trust rule as it is merged."""
    try:
        return hydra.compose_config(
            config_name=CONFIG_NAME, overrides=list(overrides), run_mode=mode, with_log_configuration=False
        )
    except yaml.YAMLError as error:
        raise ConfigError(f"a config file is not valid YAML: {shorten(error, 300)}") from error
    except (RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(_broken_file(error, overrides, dirs)) from error
    except Exception as error:
        raise_as_refusal(error, overrides, dirs)


@contextlib.contextmanager
def hydra_errors(overrides: Sequence[str], dirs: tuple[Path, ...]) -> Iterator[None]:
    """Within: what Hydra cannot compose, or write to its output folder, is a ConfigError in one line."""
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        where = f" to the output folder {error.filename}" if error.filename else ""  # a full disk names no file
        raise ConfigError(f"cannot write{where}: {error.strerror}") from error
    except Exception as error:
        raise_as_refusal(error, overrides, dirs)


def to_run_config(node: DictConfig, dirs: tuple[Path, ...]) -> RunConfig:
    """A composed node as a validated RunConfig, each option knowing its name."""
    return RunConfig.from_dict(to_data(node), dirs)


def to_data(node: DictConfig, choices: Mapping[Any, Any] | None = None) -> dict[str, Any]:
    """A composed node as plain data, not validated: what RunConfig.from_dict takes. Sweep keys are no run's business.

    ``choices`` are Hydra's (group to option), where the node does not carry them itself.
    """
    if choices is None:
        choices = node.hydra.runtime.choices if "hydra" in node else {}
    try:
        keys: list[Any] = [key for key in node if key not in BESIDE_A_RUN]
        data = OmegaConf.to_container(OmegaConf.masked_copy(node, keys), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    assert isinstance(data, dict)
    return name_options(data, dict(choices))


def name_options(data: dict[Any, Any], choices: dict[Any, Any]) -> dict[str, Any]:
    """Write the chosen option's name into each group's node; refuse a preset that left a node of its own."""
    if "preset" in data:
        raise ConfigError(
            "a preset left a 'preset' node in the config: its first line must be '# @package _global_' "
            "(without it Hydra puts the preset's keys under 'preset')"
        )
    named = {str(key): value for key, value in data.items()}
    for group in GROUPS:
        node, choice = named.get(group), choices.get(group)
        if choice and isinstance(node, list):
            raise ConfigError(f"{group}={choice}: an option's file must hold a mapping with a _target_, got {node}")
        if choice and isinstance(node, dict):
            named[group] = {"name": choice, **node}
    return named


def raise_as_refusal(error: Exception, overrides: Sequence[str], dirs: tuple[Path, ...]) -> NoReturn:
    """Raise ConfigError for what Hydra raised: it reads flags and ``hydra.*`` keys, and fails in any way it likes.

    What fluxrun's own code raised is raised on as it is.
    """
    if raised_by_fluxrun(error):
        raise error
    raise ConfigError(explain_composition(error, overrides, dirs)) from error


def explain_composition(error: BaseException, overrides: Sequence[str], dirs: tuple[Path, ...]) -> str:
    """One line for an error of Hydra's: unknown option or key with the nearest name first, else its first line."""
    if any(re.match(r"\+?lora=([\[{]|.*\.safetensors$)", override) for override in overrides):
        return LORA_FILES
    return _explained(error, overrides, dirs)


def _explained(error: BaseException, overrides: Sequence[str], dirs: tuple[Path, ...]) -> str:
    text = str(error)
    catalog = Catalog(dirs)
    if match := re.search(r"Could not find '([\w-]+)/([^']+)'", text):
        return _unknown_option(catalog, match.group(1), match.group(2))
    if match := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text):
        return _unknown_key(match.group(1) or match.group(2), dirs, overrides)
    if match := re.search(r"Could not override '?([\w./@]+)'?\.\s*No match in the defaults list", text):
        return f"unknown option group {match.group(1)!r}: {nearest(match.group(1), GROUPS)}"
    for group in GROUPS:
        if f"{group}=null" in overrides or f"{group}=" in overrides:
            return f"{group}=null: an option is needed; allowed: {', '.join(catalog.names(group))}"
    if not isinstance(error, COMPOSE_ERRORS):
        for_hydra = [o for o in overrides if o.lstrip("+~").startswith("hydra")] or overrides
        return f"Hydra cannot use {shorten(' '.join(for_hydra))}: {python_reason(error)}"
    return one_line(error) + next((hint for part, hint in HINTS.items() if part in text), "")


def _broken_file(error: BaseException, overrides: Sequence[str], dirs: tuple[Path, ...]) -> str:
    """Hydra does not say in which file: the first one among those named that has the same trouble alone."""
    for override in overrides:
        group, _, name = override.lstrip("+").partition("=")
        try:
            check_defaults(dirs, group, name)
        except ConfigError as found:
            return str(found)
    return one_line(error)


def _unknown_option(catalog: Catalog, group: str, name: str) -> str:
    try:
        catalog.path(group, name)
    except ConfigError as error:
        return str(error)
    return f"option {group}={name} could not be loaded"


def _unknown_key(key: str, dirs: tuple[Path, ...], overrides: Sequence[str]) -> str:
    parent, _, leaf = key.rpartition(".")
    known = sorted(_known_keys(parent, dirs, overrides))
    shown = shorten(next((o for o in overrides if o.lstrip("+~").startswith(key)), key))
    if leaf in known:
        return f"{key} takes its entries one by one: +{key}.NAME=VALUE"
    return f"unknown key {shorten(key)!r} (in {shown!r}): {nearest(leaf, known)}"


def _known_keys(parent: str, dirs: tuple[Path, ...], overrides: Sequence[str]) -> list[str]:
    if not parent:
        beside = {*CommandConfig.model_fields, "workers"}
        return [name for name in RunConfig.model_fields.keys() | beside if name not in ("source", "config_dirs")]
    group = parent.split(".", maxsplit=1)[0]
    if group in GROUPS:
        chosen = next((o.split("=", 1)[1] for o in overrides if o.startswith(f"{group}=")), None)
        options = Catalog(dirs).loadable(group)
        known = [options[chosen]] if chosen in options else options.values()
        return list({knob for option in known for knob in type(option).model_fields} - {"name"})
    if group in ("sweep", "ray"):
        return list((SweepConfig if group == "sweep" else RayConfig).model_fields)
    return ["warmup", "repeats"] if group == "measure" else []


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Hydra's own parse of command-line overrides; raises ConfigError in one line."""
    try:
        return OverridesParser.create(config_loader=None).parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(explain_composition(error, overrides, (conf_dir(),))) from error


def parse(hydra: Hydra, overrides: Sequence[str], dirs: tuple[Path, ...]) -> list[Override]:
    """Hydra's own parse of overrides, globs included; raises ConfigError in one line."""
    try:
        return OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(explain_composition(error, overrides, dirs)) from error


def shown(overrides: Sequence[str]) -> list[str]:
    """The overrides that say what a job is: not those for Hydra, for the sweep itself or for how it is drawn."""
    return [o for o in overrides if re.split(r"[./=@]", o.lstrip("+~"), maxsplit=1)[0] not in BESIDE_A_RUN]
