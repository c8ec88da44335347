"""``plan`` and ``doctor`` on the screen."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fluxrun.catalog import Catalog
from fluxrun.compose import compose
from fluxrun.config import RunConfig
from fluxrun.conflicts import find_conflicts
from fluxrun.errors import FluxrunError, one_line
from fluxrun.estimate import budget_bytes, memory_needs, need_in_words, ram_needs, working_bytes
from fluxrun.machine import GIB, Machine, detect
from fluxrun.options.compile import CompileKnobs
from fluxrun.plan import Choice, Plan, make_plan
from fluxrun.runner import Prepared
from fluxrun.waiting import autotunes, cache_folder, expected_wait, holds_anything

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
    needs, ram = memory_needs(plan), ram_needs(plan)
    if needs is None or ram is None:
        return None
    memory, machine = plan.options["memory"], plan.machine
    if not machine.accelerated:
        if max(plan.weight_bytes.values() if plan.weight_bytes else [0]) < GIB:
            return None
        whole = ram["balanced"] + working_bytes(plan)
        return f"memory: about {whole / GIB:.1f} of {machine.ram_bytes / GIB:.1f} GB, by an estimate"
    if memory.name not in needs:
        return None
    budget = budget_bytes(memory, machine)  # type: ignore[arg-type]
    others = ", ".join(f"{name} {need / GIB:.1f}" for name, need in needs.items() if name != memory.name)
    own = f", {ram[memory.name] / GIB:.0f} of the computer's {machine.ram_bytes / GIB:.0f}" if memory.offloads else ""  # type: ignore[attr-defined]
    chosen = need_in_words(plan, memory.name, needs[memory.name], budget)
    return f"memory: {memory.name} {chosen}{own} (else: {others})"


def waiting_line(plan: Plan) -> str | None:
    """How long the first image of a process waits for the compiler, as far as that was measured."""
    option = plan.options["compile"]
    if option.name == "none" or not isinstance(option, CompileKnobs):
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
            names = [name for name in plan.catalog.names(group) if _would_run(plan, group, name)]
            found += [f"{group}={','.join(names)}"] if names else []
    return f"usable here, not asked for: {' '.join(found)} (fluxrun tune measures them)" if found else None


def _would_run(plan: Plan, group: str, name: str) -> bool:
    """Whether an option works here beside the others; one that takes minutes is nothing to suggest."""
    option = plan.catalog.load(group, name)
    if option.fallback == "error" or autotunes(option):
        return False
    beside = [conflict for conflict in find_conflicts({**plan.options, group: option}) if conflict.group]
    return not (beside or option.requires(plan.machine) or option.inapplicable(plan))


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
    """This machine, its libraries, which options are usable (proven by a call where that is needed), and presets."""
    machine = detect().on(config.device)
    _show_machine(machine)
    table = Table("group", "option", "usable", "why not", box=None, pad_edge=False)
    catalog = Catalog(config.config_dirs)
    for group, names in catalog.groups().items():
        for name in names if group != "model" else []:
            reason = _usable(catalog, group, name, machine)
            table.add_row(group, name, "no" if reason else "yes", reason or "")
    out.print(table)
    out.print(_presets(config, machine))


def _presets(config: RunConfig, machine: Machine) -> Table:
    """Every preset, and what of it would fall back here: planned with the config's model, nothing is loaded."""
    table = Table("preset", "here", box=None, pad_edge=False)
    for name in Catalog(config.config_dirs).names("preset"):
        table.add_row(name, _fallbacks_of(name, config, machine) or "runs as it is")
    return table


def _fallbacks_of(preset: str, config: RunConfig, machine: Machine) -> str:
    own = config.config_dirs[0] if len(config.config_dirs) > 1 else None
    try:
        asked = compose([f"+preset={preset}", f"model={config.model.name}"], config_dir=own)
        choices = make_plan(asked, machine).choices.items()
    except FluxrunError as error:
        return one_line(error)
    return "; ".join(f"{group}={f.option}: {f.reason}" for group, choice in choices for f in choice.fallbacks)


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
    folder = cache_folder(None)
    _line(f"compiled code: {folder}{'' if holds_anything(folder) else ' (empty)'}")
    _line("libraries: " + ", ".join(f"{name} {version}" for name, version in machine.packages.items()))


def _line(text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)
