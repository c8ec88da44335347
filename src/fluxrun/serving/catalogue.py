"""What there is to choose from: every option with what it is for, and whether this machine can use it."""

from __future__ import annotations

from typing import Any

from fluxrun.config.catalog import Catalog, about, default_choices, purpose
from fluxrun.config.schema import GROUPS
from fluxrun.errors import FluxrunError
from fluxrun.hardware.machine import Machine
from fluxrun.options.base import Option
from fluxrun.options.model import Flux2Model
from fluxrun.trust import why_closed


def catalogue(machine: Machine, models: list[str]) -> dict[str, Any]:
    """Groups with their options; models are those that the server draws with."""
    catalog = Catalog()
    groups = {group: _group(catalog, group, machine, models) for group in GROUPS}
    presets = [{"name": name, "about": about(catalog.path("preset", name))} for name in catalog.names("preset")]
    where = machine.gpu.name if machine.gpu else f"{machine.cpu} ({machine.cpu_count} cores)"
    return {"device": machine.device, "machine": where, "groups": groups, "presets": presets}


def _group(catalog: Catalog, group: str, machine: Machine, models: list[str]) -> dict[str, Any]:
    names = [name for name in catalog.names(group) if group != "model" or name in models]
    return {
        "about": purpose(group),
        "default": default_choices()[group],
        "options": [_option(catalog, group, name, machine) for name in names],
    }


def _option(catalog: Catalog, group: str, name: str, machine: Machine) -> dict[str, Any]:
    try:
        option = catalog.load(group, name)
        reason = option.requires(machine)
    except FluxrunError as error:  # an option file that is wrong: the others are still worth showing
        broken = {"name": name, "about": "", "usable": False, "why_not": str(error)}
        return {**broken, "needs": None, "fallback": None, "knobs": []}
    return {
        "name": name,
        "about": about(catalog.path(group, name)),
        "needs": option.requires(Machine()),  # what a machine without anything is told that it lacks
        "usable": reason is None,
        "why_not": reason,
        "fallback": None if option.fallback == "error" else option.fallback,
        "knobs": _knobs(option),
        **(
            {"height": option.height, "width": option.width, "steps": option.steps}
            if isinstance(option, Flux2Model)
            else {}
        ),
    }


def _knobs(option: Option) -> list[dict[str, Any]]:
    """The knobs that a request may set, with the option's own values."""
    values = option.model_dump(mode="json")
    fields = type(option).model_fields.items()
    named = ("name", "fallback")
    return [{"name": n, "value": values[n]} for n, knob in fields if n not in named and why_closed(knob) is None]
