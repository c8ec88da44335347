"""``fluxrun doctor``: this machine, its libraries, which options and presets are usable here."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from fluxrun.cli.arguments import composed_from
from fluxrun.cli.plan import _line, out
from fluxrun.compilation.cache_folder import cache_folder, holds_anything
from fluxrun.config.catalog import Catalog
from fluxrun.config.composition import compose
from fluxrun.config.schema import RunConfig
from fluxrun.errors import ConfigError, FluxrunError, one_line
from fluxrun.formatting import GIB
from fluxrun.hardware.detection import detect
from fluxrun.hardware.machine import Machine
from fluxrun.pipeline.kernel_probe import prove
from fluxrun.planning.prepare import make_plan


def command(arguments: Sequence[str]) -> int:
    """``fluxrun doctor [overrides]``: this machine, its libraries, which options are usable; probes the kernels."""
    overrides, config_dir = composed_from("doctor", command.__doc__, arguments)
    show_doctor(compose(overrides, config_dir=config_dir))
    return 0


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
    out.print(table, markup=False)  # a reason can hold brackets
    out.print(_presets(config, machine), markup=False)


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
    try:
        option = catalog.load(group, name)
    except ConfigError as error:  # one of the user's own files; the rest is still worth showing
        return str(error)
    reason = option.requires(machine)
    if reason is None and option.needs_proof and f"{group}={name}" not in machine.proven:
        reason = prove(machine, catalog, group, name).reason
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
