"""Small things several test modules use: machines that are not here, child processes, tiny runs."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

    return run(small(*overrides, config_dir=config_dir), folder, **how)


def hashes(record: RunRecord) -> list[str]:
    """The pictures' pixel hashes."""
    return [image.sha256 for image in record.images]


def command(*arguments: str) -> list[str]:
    """The command line of a fluxrun child process."""
    return [sys.executable, "-m", "fluxrun", *arguments]


def fluxrun(
    *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run fluxrun in a child process, as a user would, and wait for it."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env={**os.environ, "COLUMNS": "300", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def said(error: Sequence[str] | str) -> list[str]:
    """The lines on a stream that are not empty."""
    text = error if isinstance(error, str) else "\n".join(error)
    return [line for line in text.splitlines() if line.strip()]
