"""``plan`` and ``doctor`` on the screen."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fluxrun.catalog import Catalog
from fluxrun.config import RunConfig
from fluxrun.machine import GIB, Machine, detect
from fluxrun.plan import Choice
from fluxrun.runner import Prepared

out = Console()


def show_plan(prepared: Prepared) -> None:
    """What would run, what falls back and why, and what is still to be proven."""
    plan = prepared.plan
    height, width = plan.size
    steps = plan.config.steps or plan.model.steps
    where = f"on {plan.machine.device} ({plan.dtype}), weights: {prepared.located.source}"
    _line(f"{len(prepared.jobs)} image(s), {width}x{height}, {steps} step(s), {where}")
    if announcement := prepared.located.announcement():
        _line(announcement)
    table = Table("group", "requested", "would run", "proof", "why", box=None, pad_edge=False)
    for group, choice in plan.choices.items():
        table.add_row(group, choice.requested, choice.effective, _proof(group, choice, plan.machine), _why(choice))
    out.print(table)
    for note in plan.notes:
        _line(f"note: {note}")


def _why(choice: Choice) -> str:
    reasons = [f"{f.option}: {f.reason}" for f in choice.fallbacks]
    return "; ".join([*reasons, *([str(choice.facts["chosen_because"])] if "chosen_because" in choice.facts else [])])


def _proof(group: str, choice: Choice, machine: Machine) -> str:
    """Only kernels from outside torch need proof by a real call."""
    if not getattr(choice.option, "package", None):
        return ""
    proof = machine.proven.get(f"{group}={choice.effective}")
    return "not probed yet" if proof is None else "failed" if proof.reason else "proven"


def show_doctor(config: RunConfig) -> None:
    """This machine, its libraries, and for every option whether it is usable, proven by a call where that is needed."""
    machine = detect().on(config.device)
    _show_machine(machine)
    table = Table("group", "option", "usable", "why not", box=None, pad_edge=False)
    catalog = Catalog(config.config_dirs)
    for group, names in catalog.groups().items():
        for name in names if group != "model" else []:
            reason = _usable(catalog, group, name, machine)
            table.add_row(group, name, "no" if reason else "yes", reason or "")
    out.print(table)


def _usable(catalog: Catalog, group: str, name: str, machine: Machine) -> str | None:
    from fluxrun.probe import prove

    option = catalog.load(group, name)
    reason = option.requires(machine)
    needs_proof = getattr(option, "package", None) or getattr(option, "flash_impl", None)
    if reason is None and needs_proof and f"{group}={name}" not in machine.proven:
        reason = prove(machine, group, name).reason
    return reason


def _show_machine(machine: Machine) -> None:
    cpu = f"{machine.cpu} ({machine.cpu_count} cores, {machine.ram_bytes / GIB:.0f} GB)"
    _line(f"{machine.platform}, Python {machine.python}, {cpu}")
    for gpu in machine.gpus:
        memory = f"{gpu.memory_bytes / GIB:.0f} GB, {gpu.free_bytes / GIB:.0f} GB free"
        _line(f"{gpu.name}: {memory}, compute {'.'.join(map(str, gpu.capability))}, driver {machine.driver}")
    if not machine.gpus:
        _line("no GPU that NVIDIA's driver answers for")
    _line(f"torch's CUDA: {machine.torch_cuda or 'none (CPU build)'}; C++ compiler: {machine.cxx_compiler or 'none'}")
    _line("libraries: " + ", ".join(f"{name} {version}" for name, version in machine.packages.items()))


def _line(text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)
