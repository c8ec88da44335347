"""Small things several test modules use: machines that are not here, child processes, tiny runs."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from fork_server import Forked, ForkServer, import_libraries

from fluxrun.config.composition import compose
from fluxrun.config.schema import GROUPS, RunConfig
from fluxrun.formatting import GIB
from fluxrun.hardware.machine import Gpu, Machine
from fluxrun.planning.plan import Plan
from fluxrun.planning.prepare import prepare
from fluxrun.record.schema import RunRecord

CONF = Path(__file__).resolve().parents[1] / "conf"
SMALL = ("model=tiny", "height=64", "width=64", "steps=2", "model.max_sequence_length=32")
"""The cheapest picture that still has two denoising steps, of random weights: for everything but what is drawn."""

GLOBAL = "# @package _global_\n# fluxrun +preset=mine\n"
"""How a preset's file begins."""

SERVER = ForkServer(os.environ)
"""Starts fluxrun processes; its environment is the one that conftest has set, before any test changes it."""

Child = Forked | subprocess.Popen[bytes]
"""A process as the tests see it."""

CUDA_PACKAGES = {"torch": "2.11.0+cu130", "diffusers": "0.42.1", "triton": "3.6.0", "torchao": "0.18.0"}


def cuda_machine(
    name: str, gigabytes: float, capability: tuple[int, int], *, free: float | None = None, ram: float = 256,
    **packages: str,
) -> Machine:  # fmt: skip
    """A Linux computer with one NVIDIA GPU; ``packages`` are installed too (``_`` for ``-``)."""
    gpu = Gpu(name, int(gigabytes * GIB), int((gigabytes if free is None else free) * GIB), capability)
    installed = {**CUDA_PACKAGES, **{key.replace("_", "-"): version for key, version in packages.items()}}
    return Machine(
        gpus=(gpu,),
        driver="580.159",
        torch_cuda="13.0",
        cxx_compiler="/usr/bin/g++",
        packages=installed,
        ram_bytes=int(ram * GIB),
        device="cuda",
    )


H100 = cuda_machine("NVIDIA H100 80GB HBM3", 80, (9, 0))
RTX_4090 = cuda_machine("NVIDIA GeForce RTX 4090", 24, (8, 9))
T4 = cuda_machine("Tesla T4", 15, (7, 5))
CPU = Machine(packages={"torch": "2.13.0+cpu", "diffusers": "0.42.1"}, cxx_compiler="/usr/bin/g++")
CPU_WITHOUT_COMPILER = Machine(packages=CPU.packages)


def option_names(group: str) -> list[str]:
    """The options that come with fluxrun, by glob."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def every_option() -> list[tuple[str, str]]:
    """All (group, option) pairs of conf/."""
    return [(group, name) for group in GROUPS for name in option_names(group)]


@functools.cache
def composed(*overrides: str) -> RunConfig:
    """A composed config; it is frozen, so that tests can share it."""
    return compose(list(overrides))


def plan_on(machine: Machine, *overrides: str) -> Plan:
    """The plan of a run on a machine that is not here."""
    return prepare(composed(*overrides), machine).plan


def effective(plan: Plan) -> dict[str, str]:
    """What would run, by group."""
    return {group: choice.effective for group, choice in plan.choices.items()}


def small(*overrides: str, config_dir: Path | None = None) -> RunConfig:
    """The config of a tiny run; ``overrides`` may name another model."""
    base = SMALL[1:] if any(override.startswith("model=") for override in overrides) else SMALL
    return compose([*base, *overrides], config_dir=config_dir) if config_dir else composed(*base, *overrides)


def draw(folder: Path, *overrides: str, config_dir: Path | None = None, **how: Any) -> RunRecord:
    """A tiny run in this process."""
    from fluxrun.runner import run

    import_libraries()
    return run(small(*overrides, config_dir=config_dir), folder, **how)


def hashes(record: RunRecord) -> list[str]:
    """The pictures' pixel hashes."""
    return [image.sha256 for image in record.images]


def command(*arguments: str) -> list[str]:
    """The command line of a fluxrun child process."""
    return [sys.executable, "-m", "fluxrun", *arguments]


def start_fluxrun(
    *arguments: str, cwd: Path, stderr: IO[Any], stdout: IO[Any] | None = None, env: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> Child:  # fmt: skip
    """A fluxrun process in a session of its own; ``fresh``: by a new interpreter, as a user's command line does it."""
    environment = {**os.environ, **(env or {})}
    with open(os.devnull, "r+b") as nothing:
        where: dict[str, Any] = {"cwd": cwd, "env": environment, "stdout": stdout or nothing, "stderr": stderr}
        if fresh or not SERVER.serves(environment):
            return subprocess.Popen(command(*arguments), stdin=nothing, start_new_session=True, **where)
        return SERVER.start(["fluxrun", *arguments], **where)


def fluxrun(
    *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run fluxrun in a child process, as a user would, and wait for it."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        environment = {"COLUMNS": "300", **(env or {})}
        child = start_fluxrun(*arguments, cwd=cwd, stdout=out, stderr=err, env=environment, fresh=fresh)
        code = child.wait(timeout)
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), err.read())


def said(error: Sequence[str] | str) -> list[str]:
    """The lines on a stream that are not empty."""
    text = error if isinstance(error, str) else "\n".join(error)
    return [line for line in text.splitlines() if line.strip()]


def reasons(plan: Plan, group: str) -> list[tuple[str, str, str]]:
    """What a group fell back from: option, stage, reason."""
    return [(f.option, f.stage, f.reason) for f in plan.choices[group].fallbacks]


def preset(folder: Path, text: str, name: str = "mine") -> None:
    """Write a preset into a config folder."""
    (folder / "preset").mkdir(exist_ok=True)
    (folder / "preset" / f"{name}.yaml").write_text(text)
