"""Falling back: the one place where an option gives way to another, and says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fluxrun.config.catalog import neutral_options
from fluxrun.errors import ConfigError, OptionUnavailable, OutOfMemory
from fluxrun.formatting import GIB
from fluxrun.options.base import Option
from fluxrun.options.conflicts import Conflict, find_conflicts
from fluxrun.options.groups import BLAME_ORDER
from fluxrun.options.memory import LADDER
from fluxrun.planning.plan import Plan
from fluxrun.record.schema import Fallback, Stage, replacement

log = logging.getLogger("fluxrun.build")

MOST_CHANGES = 50
"""More changes than any sound plan takes: then options of a user's own point at each other."""


def _give_way(plan: Plan, group: str, fallback: Fallback, option: Option) -> None:
    """The record of a fallback and the option that takes over; nothing else appends a fallback."""
    choice = plan.choices[group]
    choice.fallbacks.append(fallback)
    choice.option = option
    choice.facts = {}


def fall_back(plan: Plan, group: str, stage: Stage, reason: str, error_type: str | None = None) -> None:
    """Let an option give way to the fallback that it names.

    Raises OptionUnavailable when there is none (``error``), with ``strict=true``, or when all were tried.
    """
    choice = plan.choices[group]
    failed = choice.option
    tried = {fallback.option for fallback in choice.fallbacks} | {failed.name}
    if plan.config.strict:
        raise OptionUnavailable(f"{group}={failed.name}: {reason} (strict=true allows no fallback)", stage=stage)
    if failed.fallback == "error" or failed.fallback in tried or (failed.inherent and stage != "requires"):
        raise OptionUnavailable(f"{group}={failed.name}: {reason}", stage=stage)
    option = plan.catalog.load(group, failed.fallback, like=failed)
    _give_way(plan, group, Fallback(option=failed.name, stage=stage, reason=reason, error_type=error_type), option)


def give_way_to_neutral(plan: Plan, group: str, reason: str) -> None:
    """Let an option give way to its group's neutral one, which a drawing is to show, or has shown, to do better.

    Raises OptionUnavailable or ConfigError where the other options do not go with it.
    """
    failed = plan.choices[group].option
    option = plan.catalog.load(group, neutral_options()[group], like=failed)
    _give_way(plan, group, Fallback(option=failed.name, stage="first_call", reason=reason), option)
    settle(plan)


def remembered(plan: Plan) -> Callable[[], None]:
    """What puts the plan's choices and notes back as they are now."""
    choices = {
        group: replace(choice, fallbacks=list(choice.fallbacks), facts=dict(choice.facts))
        for group, choice in plan.choices.items()
    }
    notes = list(plan.notes)

    def put_back() -> None:
        plan.choices.update(choices)
        plan.notes[:] = notes

    return put_back


def settle(plan: Plan) -> None:
    """Follow requires, auto choices and conflicts until nothing changes any more."""
    for _ in range(MOST_CHANGES):
        if not (_follow_requires(plan) or _follow_autos(plan) or _follow_conflicts(plan)):
            return
    chain = ", ".join(f"{group}={choice.effective}" for group, choice in plan.choices.items() if choice.fallbacks)
    raise ConfigError(f"the options' fallbacks and conflicts go round in a circle ({chain})")


def _follow_requires(plan: Plan) -> bool:
    workload = plan.workload
    for group, choice in plan.choices.items():
        if reason := choice.option.requires(plan.machine) or choice.option.inapplicable(workload):
            fall_back(plan, group, "requires", reason)
            return True
    return False


def _follow_autos(plan: Plan) -> bool:
    workload = plan.workload
    for group, choice in plan.choices.items():
        if chosen := choice.option.resolve(workload):
            plan.switch(group, chosen.option, {"chosen_because": chosen.because})
            if chosen.note:
                plan.note(chosen.note)
            return True
    return False


def _follow_conflicts(plan: Plan) -> bool:
    for conflict in find_conflicts(plan.options):
        if conflict.group is None or conflict.instead is None:
            plan.note(conflict.why)
        else:
            _settle_conflict(plan, conflict, conflict.group, conflict.instead)
            return True
    return False


def _settle_conflict(plan: Plan, conflict: Conflict, group: str, instead: str) -> None:
    choice = plan.choices[group]
    if plan.config.strict:
        raise OptionUnavailable(f"{group}={choice.effective}: {conflict.why} (strict=true)")
    narrowed = conflict.narrowed(choice.option)
    change = f": {conflict.target} is taken out of {group}.targets" if narrowed else ""
    fallback = Fallback(option=choice.effective, stage="requires", reason=conflict.why + change)
    # Handing on the knob that makes the conflict would only bring it back.
    option = narrowed or plan.catalog.load(group, instead, like=choice.option, without=conflict.drop)
    _give_way(plan, group, fallback, option)


def step_down(plan: Plan, stage: Stage, reason: str, error_type: str, *, whole: bool) -> None:
    """Out of memory: with memory=auto the next rung of the ladder; ``whole``: one that keeps the text encoder.

    Raises OutOfMemory, which says what would fit, where there is none, memory was chosen by name, or strict=true.
    """
    if plan.guidance_batched and not plan.config.strict:
        plan.guidance_batched = False
        plan.note("guidance_batched: out of memory, so a step is two calls of the transformer")
        log.warning("%s", plan.notes[-1])
        return
    choice = plan.choices["memory"]
    below = LADDER[LADDER.index(choice.effective) + 1 :]
    rungs = [name for name in below if _usable(plan, "memory", name) and not (whole and name == "staged")]
    if choice.requested != "auto" or not rungs or plan.config.strict:
        raise OutOfMemory(_advice(plan, rungs))
    option, facts = plan.catalog.load("memory", rungs[0], like=choice.option), choice.facts
    fallback = Fallback(option=choice.effective, stage=stage, reason=reason, error_type=error_type)
    _give_way(plan, "memory", fallback, option)
    choice.facts = {**facts, "chosen_because": "the rung above ran out of memory"}


def _usable(plan: Plan, group: str, name: str) -> bool:
    return plan.catalog.load(group, name).requires(plan.machine) is None


def _advice(plan: Plan, rungs: Sequence[str]) -> str:
    gpu, memory = plan.machine.gpu, plan.memory
    where = f"{gpu.name} ({gpu.memory_bytes / GIB:.0f} GB)" if gpu else f"{plan.machine.device}"
    ideas = [f"memory={name}" for name in rungs[:2]]
    if memory.blocks_to_swap is not None and memory.swaps_blocks:
        ideas.insert(0, "a larger memory.blocks_to_swap, or null")
    if plan.quantization.name == neutral_options()["quantization"] and _usable(plan, "quantization", "fp8"):
        ideas.append("quantization=fp8")
    height, width = plan.size
    if min(height, width) >= 64:
        ideas.append(f"height={height // 32 * 16} width={width // 32 * 16}")
    return f"out of memory on {where} with memory={memory.name}; try {' or '.join(ideas[:3])}"


def suspects(plan: Plan) -> list[str]:
    """Groups whose option can fall back, the likeliest culprit first."""
    options = {group: plan.choices[group].option for group in BLAME_ORDER}
    return [group for group, option in options.items() if option.fallback != "error" and not option.inherent]


def not_neutral(plan: Plan) -> list[str]:
    """The suspects whose option is not their group's neutral one."""
    return [group for group in suspects(plan) if plan.choices[group].effective != neutral_options()[group]]


def known(plan: Plan) -> dict[str, int]:
    """How many fallbacks each group has: what ``announce`` has said by now."""
    return {group: len(choice.fallbacks) for group, choice in plan.choices.items()}


def announce(plan: Plan, said: Mapping[str, int], trace: str = "") -> None:
    """One line for each fallback beyond those ``said``, also of options that cannot stand beside a new one.

    The log file has the traceback with the line of an option that failed; the console leaves it out.
    """
    for group, choice in plan.choices.items():
        for fallback in choice.fallbacks[said.get(group, 0) :]:
            when = f"{fallback.stage}: " if trace else ""
            text = (
                f"{group}={fallback.option} cannot be used, falling back to "
                f"{replacement(fallback, choice.effective)} ({when}{fallback.reason})"
            )
            _warn(text, "" if fallback.stage == "requires" else trace)


def _warn(text: str, trace: str) -> None:
    """A warning with a traceback as text: a handler that keeps a record's ``exc_info`` would keep the frames, too."""
    if log.isEnabledFor(logging.WARNING):
        fields = {"name": log.name, "levelno": logging.WARNING, "levelname": "WARNING", "msg": text}
        log.handle(logging.makeLogRecord({**fields, "exc_text": trace or None}))
