"""What a config from a stranger may not do: name code, programs, files or secrets, or steer Hydra."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic.fields import FieldInfo

from fluxrun.errors import TrustError

TRUST_VARIABLE = "FLUXRUN_TRUST_CONFIG"
OWN_TARGETS = "fluxrun.options."
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


@dataclass(frozen=True)
class OpenWhere:
    """A knob that is open for some values only: texts that match ``pattern`` as a whole."""

    pattern: str
    why: str
    """Why others are the command line's alone."""


UNMARKED = "its schema does not open it to other people's files"


def why_closed(knob: FieldInfo) -> str | None:
    """Why a stranger's file may not set this knob, or may not to every value; None for an open one."""
    if OpenToStrangers in knob.metadata:
        return None
    return next((mark.why for mark in knob.metadata if isinstance(mark, Closed | OpenWhere)), UNMARKED)


def objection(knob: FieldInfo, value: Any) -> str | None:
    """Why a stranger's file may not set this knob to this value, or None where it may.

    Its default, and nothing at all, say nothing: a copy of an option file of ours writes every knob out.
    """
    if value is None or value in ([], {}) or value == knob.get_default(call_default_factory=True):
        return None
    matching = (mark.pattern for mark in knob.metadata if isinstance(mark, OpenWhere))
    if any(isinstance(value, str) and re.fullmatch(pattern, value) for pattern in matching):
        return None
    return why_closed(knob)


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


def refuse(where: str, key: str, why: str) -> TrustError:
    """The refusal of a key in a file, a record or a picture: which one, why, and how to lift it."""
    return TrustError(f"{where} sets {key!r}: {why}; {HOW_TO_LIFT}")


_NAME_OF_A_KEY = re.compile(r"(?<!\\)(?:\\\\)*\$\{(?!hydra\b)[A-Za-z_]\w*(?:\.\w+)*\}")
"""An interpolation that names another key of the config, and nothing else: no resolver, nothing of Hydra's."""


def interpolation_beyond_config(text: str) -> str | None:
    """The first ``${…}`` of a text that is more than another key's full name: ``${oc.env:HOME}`` reads a variable."""
    rest = _NAME_OF_A_KEY.sub("", text)
    found = re.search(r"(?<!\\)(?:\\\\)*(\$\{.*)", rest, re.DOTALL)
    return found[1] if found else None
