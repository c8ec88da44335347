"""What a config from a stranger may not do: name foreign code, or steer Hydra before our code runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel

from fluxrun.errors import ConfigError, TrustError
from fluxrun.reading import Unreadable, parse_yaml, read_text

TRUST_VARIABLE = "FLUXRUN_TRUST_CONFIG"
OWN_TARGETS = "fluxrun.options."
SWEEP_KEYS = {("mode",), ("sweeper", "params")}
"""The only ``hydra.*`` keys a sweep file may set."""
HOW_TO_LIFT = f"if you trust it, pass --trust-config or set {TRUST_VARIABLE}=1"

# --- marks on a schema ----------------------------------------------------------------------------------------------

T = TypeVar("T")


class OpenToStrangers:
    """The mark in a knob's type by which any config file may set it; without it a knob is the command line's alone."""


Open = Annotated[T, OpenToStrangers]
"""``steps: Open[int]`` is an ``int`` with that mark."""


@dataclass(frozen=True)
class Closed:
    """Why a knob is the command line's alone: ``hub: Annotated[bool, Closed("…")]``."""

    why: str


UNMARKED = "its schema does not open it to other people's files"


def closed_in(models: Iterable[type[BaseModel]]) -> dict[str, str]:
    """The knobs of these models that a stranger's config may not set, by name, and why.

    A field that holds another model is no knob but a place for some. A name that is closed in one model is so in all:
    in a file's text nobody can tell yet which option its keys will end up in.
    """
    fields = [(name, field) for model in models for name, field in model.model_fields.items()]
    return {
        name: next((mark.why for mark in field.metadata if isinstance(mark, Closed)), UNMARKED)
        for name, field in fields
        if OpenToStrangers not in field.metadata
        and not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    }


# --- the rule -------------------------------------------------------------------------------------------------------


def trusted() -> bool:
    """Whether the command line (``--trust-config``) or the environment lifts the trust rule."""
    return os.environ.get(TRUST_VARIABLE, "") not in ("", "0", "false")


def check_target(target: str) -> None:
    """Refuse a ``_target_`` outside fluxrun's own option modules, before anything is imported."""
    if not target.startswith(OWN_TARGETS) and not trusted():
        raise TrustError(
            f"_target_ {target!r} is not one of fluxrun's own ({OWN_TARGETS}*): a config may not run foreign code; "
            + HOW_TO_LIFT
        )


def check_file(path: Path, group: str, own_dir: Path, *, closed: Mapping[str, str], package: str | None = None) -> None:
    """Refuse a config file outside ``own_dir`` that sets ``hydra.*``, lies in the hydra package or sets a closed knob.

    Hydra acts on callbacks, logging and run.dir before any of our code runs, so this is looked at in the file's
    text and before Hydra composes it. ``package`` is where Hydra puts the file's keys: a folder called hydra would
    shadow Hydra's own files. Raises TrustError, or ConfigError for YAML that cannot be read.
    """
    if trusted() or path.resolve().is_relative_to(own_dir.resolve()):
        return
    text = _read(path)
    content = _parse(path, text)
    header = re.search(r"^\s*#\s*@package\s+(\S+)", text, re.MULTILINE)
    packages = [package or "", header.group(1) if header else ""]
    steers = [f"package {name}" for name in packages if name.split(".", maxsplit=1)[0] == "hydra"]
    steers += [".".join(("hydra", *keys)) for keys in _hydra_keys(content) if not (group == "sweep" and _allowed(keys))]
    steers += [entry for entry in _defaults(content) if "hydra" in entry]
    if steers:
        raise TrustError(f"{path} sets {steers[0]!r}: a config file may not steer Hydra itself; {HOW_TO_LIFT}")
    for name in packages:
        check_knobs(_packed(content, name), str(path), closed)


def check_knobs(content: Any, where: str, closed: Mapping[str, str]) -> None:
    """Refuse a stranger's config that sets one of the knobs that are ``closed``, at whatever depth."""
    if not isinstance(content, dict) or trusted():
        return
    for key, value in content.items():
        if key in closed and value:
            raise TrustError(f"{where} sets {key!r}: {closed[key]}; {HOW_TO_LIFT}")
        check_knobs(value, where, closed)


def _packed(content: Any, package: str) -> Any:
    """A file's content as it will lie in the config: ``# @package compile.inductor_options`` sets that knob, too."""
    for part in reversed(package.split(".") if package else []):
        content = {part: content}
    return content


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except (FileNotFoundError, Unreadable) as error:
        raise ConfigError(f"{path} {error}") from error


def _parse(path: Path, text: str) -> Any:
    try:
        return parse_yaml(text)
    except Unreadable as error:
        raise ConfigError(f"{path} {error}") from error


def _hydra_keys(content: Any) -> list[tuple[str, ...]]:
    node = content.get("hydra") if isinstance(content, dict) else None
    dotted = [k for k in content if str(k).startswith("hydra.")] if isinstance(content, dict) else []
    return _leaves(node) + [tuple(str(k).split(".")[1:]) for k in dotted]


def _leaves(node: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(node, dict) and node:
        return [leaf for key, value in node.items() for leaf in _leaves(value, (*prefix, str(key)))]
    return [prefix] if node is not None else []


def _allowed(keys: tuple[str, ...]) -> bool:
    return any(keys[: len(allowed)] == allowed for allowed in SWEEP_KEYS)


def _defaults(content: Any) -> list[str]:
    entries = content.get("defaults") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        return []
    return [str(next(iter(entry))) if isinstance(entry, dict) and entry else str(entry) for entry in entries]
