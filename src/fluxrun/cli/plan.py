"""``fluxrun plan``: what would run here, and why not the rest; loads nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from fluxrun.cli.arguments import composed_from
from fluxrun.compilation.cache_folder import cache_folder, holds_anything
from fluxrun.config.composition import compose
from fluxrun.formatting import GIB
from fluxrun.hardware.machine import Machine
from fluxrun.options.base import Option
from fluxrun.options.compile import expected_wait
from fluxrun.options.conflicts import find_conflicts
from fluxrun.options.memory import LADDER
from fluxrun.planning.plan import Choice, Plan
from fluxrun.planning.prepare import Prepared, prepare
from fluxrun.terminal import make_console

out = make_console()


def command(arguments: Sequence[str]) -> int:
    """``fluxrun plan [overrides]``: what would run here, and why not the rest; loads nothing."""
    overrides, config_dir = composed_from("plan", command.__doc__, arguments)
    show_plan(prepare(compose(overrides, config_dir=config_dir)))
    return 0


def show_plan(prepared: Prepared) -> None:
    """What would run, what falls back and why, and what is still to be proven."""
    plan = prepared.plan
    height, width = plan.size
    steps = plan.steps_made
    where = f"on {plan.machine.device} ({plan.dtype}), weights: {prepared.located.source}"
    _line(f"{len(prepared.jobs)} image(s), {width}x{height}, {steps} step(s), {where}")
    if announcement := prepared.located.announcement():
        _line(announcement)
    out.print(_choices(plan))
    for text in (memory_line(plan), waiting_line(plan), also_line(plan)):
        if text:
            _line(text)
    for note in plan.notes:
        _line(f"note: {note}")


def _choices(plan: Plan) -> Table:
    proofs = {group: _proof(group, choice, plan.machine) for group, choice in plan.choices.items()}
    columns = ("group", "requested", "would run", *(["proof"] if any(proofs.values()) else []), "why")
    table = Table(*columns, box=None, pad_edge=False)
    for group, choice in plan.choices.items():
        proof = [proofs[group]] if "proof" in columns else []
        table.add_row(group, choice.requested, choice.effective, *proof, _why(choice))
    return table


def memory_line(plan: Plan) -> str | None:
    """The estimate of the placement chosen against what there is, and of the other ones."""
    estimate, memory, machine = plan.estimate, plan.memory, plan.machine
    needs, ram = estimate.memory_needs(), estimate.ram_needs()
    if needs is None or ram is None:
        return None
    if not machine.accelerated:
        if max(plan.weight_bytes.values() if plan.weight_bytes else [0]) < GIB:
            return None
        whole = ram["balanced"] + estimate.working_bytes()
        return f"memory: about {whole / GIB:.1f} of {machine.ram_bytes / GIB:.1f} GB, by an estimate"
    if memory.name not in needs:
        return None
    others = ", ".join(f"{name} {needs[name].bytes / GIB:.1f}" for name in LADDER if name != memory.name)
    own = f", {ram[memory.name] / GIB:.0f} of the computer's {machine.ram_bytes / GIB:.0f}" if memory.offloads else ""
    chosen = needs[memory.name].described(memory.budget_bytes(machine))
    return f"memory: {memory.name} {chosen}{own} (else: {others})"


def waiting_line(plan: Plan) -> str | None:
    """How long the first image of a process waits for the compiler, as far as that was measured."""
    option = plan.compile
    if not option.active:
        return None
    if not option.compiles:
        return "first image: nothing to compile; the second step records the CUDA graph"
    folder = cache_folder(option.cache_dir)
    there = f"less if what {folder} holds fits" if holds_anything(folder) else f"{folder} is empty"
    return f"first image: {expected_wait(option, plan.machine)} for the compiler ({there})"


def also_line(plan: Plan) -> str | None:
    """What would be faster here and was not asked for: fluxrun tune measures it."""
    if not plan.machine.accelerated:
        return None
    found = []
    for group in ("kernels", "compile", "quantization"):
        if plan.choices[group].option.fallback == "error":
            options = plan.catalog.loadable(group).items()
            names = [name for name, option in options if _would_run(plan, group, option)]
            found += [f"{group}={','.join(names)}"] if names else []
    return f"usable here, not asked for: {' '.join(found)} (fluxrun tune measures them)" if found else None


def _would_run(plan: Plan, group: str, option: Option) -> bool:
    """Whether an option works here beside the others; one that takes minutes is nothing to suggest."""
    if option.fallback == "error" or option.autotunes:
        return False
    beside = [conflict for conflict in find_conflicts({**plan.options, group: option}) if conflict.group]
    return not (beside or option.requires(plan.machine) or option.inapplicable(plan.workload))


def _why(choice: Choice) -> str:
    reasons = [f"{f.option}: {f.reason}" for f in choice.fallbacks]
    return "; ".join([*reasons, *([str(choice.facts["chosen_because"])] if "chosen_because" in choice.facts else [])])


def _proof(group: str, choice: Choice, machine: Machine) -> str:
    """Only kernels from outside torch need proof by a real call."""
    if not choice.option.needs_proof:
        return ""
    proof = machine.proven.get(f"{group}={choice.effective}")
    return "not probed yet" if proof is None else "failed" if proof.reason else "proven"


def _line(text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)
