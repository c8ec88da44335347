"""Which optional libraries a run may come to use: what its options name, and all that these can fall back to."""

from __future__ import annotations

from collections.abc import Iterator

from fluxrun.options.base import COMPILER, Option, is_own
from fluxrun.options.conflicts import CONFLICTS, Conflict
from fluxrun.planning.plan import Plan
from fluxrun.planning.prepare import Prepared
from fluxrun.weights.find import needs_torchvision
from fluxrun.weights.location import Located


def libraries_of(prepared: Prepared) -> frozenset[str] | None:
    """Their module names; None where anything may be needed: an option of the user's own, or of unknown kernels."""
    plan, found = prepared.plan, _reading(prepared.located)
    for group in plan.choices:
        for option in _reachable(plan, group):
            if option.libraries is None or not is_own(type(option)):
                return None
            found |= option.libraries
    return frozenset(found)


def _reachable(plan: Plan, group: str) -> Iterator[Option]:
    """The option in use and every other one that may take its place and that this machine can use."""
    first = plan.choices[group].option
    yield first
    seen, names = {first.name}, _next(group, first)
    while names:
        if (name := names.pop()) in seen:
            continue
        seen.add(name)
        option = plan.catalog.load(group, name)
        names += _next(group, option)
        if option.requires(plan.machine) is None:
            yield option


def _next(group: str, option: Option) -> list[str]:
    """What may take an option's place: what it chooses among, its fallback, and what conflicts put there."""
    fallback = [] if option.fallback == "error" else [option.fallback]
    rows = (row for row in CONFLICTS if _may_replace(row, group, option))
    return [*option.alternatives, *fallback, *(row.instead for row in rows if row.instead is not None)]


def _may_replace(row: Conflict, group: str, option: Option) -> bool:
    """Whether an option's own side of a conflict holds; the other groups may come to hold theirs."""
    return row.group == group and all(side.holds(option) for side in (row.a, row.b) if side.group == group)


def _reading(located: Located) -> set[str]:
    """What reads a checkpoint: its text processor, and what its weights are quantized with, all of which compile."""
    packages = {declared.package for declared in located.declared.values() if declared.package}
    compiles = {COMPILER} if packages else set()
    return packages | compiles | ({"torchvision"} if needs_torchvision(located) else set())
