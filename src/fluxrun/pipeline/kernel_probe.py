"""Proof by doing: one real kernel call in a child process, remembered by versions, driver and GPU.

``python -m fluxrun.pipeline.kernel_probe GROUP NAME DEVICE CONFIG_DIR…`` is the child: a crash of the kernel ends it,
never the run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from fluxrun.config.catalog import Catalog
from fluxrun.hardware.machine import Machine, Proof
from fluxrun.hardware.proofs import remember
from fluxrun.options.attention import Attention
from fluxrun.options.base import Option
from fluxrun.process.switches import import_diffusers

PROBE_SECONDS = 120


def prove(machine: Machine, catalog: Catalog, group: str, name: str) -> Proof:
    """Run the probe of a catalog's option in a child process and remember the result.

    The child imports torch and diffusers (seconds), calls the kernel once at head size 128 and ends.
    """
    module = [sys.executable, "-m", "fluxrun.pipeline.kernel_probe"]
    command = [*module, group, name, machine.device, *map(str, catalog.dirs)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        reason = _reason(child.returncode, child.stdout, child.stderr)
    except subprocess.TimeoutExpired:
        reason = f"the probe did not end within {PROBE_SECONDS} s"
    proof = Proof(reason, datetime.now(UTC).isoformat(timespec="seconds"))
    remember(machine, f"{group}={name}", proof)
    return proof


def _reason(code: int, stdout: str, stderr: str) -> str | None:
    lines = [line for line in stdout.splitlines() if line.startswith("{")]
    if lines:
        found: str | None = json.loads(lines[-1])["reason"]
        return found
    tail = [line for line in stderr.splitlines() if line.strip()]
    return f"the probe died with exit code {code}: {tail[-1][:200] if tail else 'no message'}"


def main(group: str, name: str, device: str, *dirs: str) -> None:
    """The child: call the option's kernel once and print ``{"reason": …}``."""
    reason = None
    try:
        _call(Catalog(tuple(map(Path, dirs))).load(group, name), device)
    except BaseException as error:  # whatever a library throws, also SystemExit, is the finding here
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
    print(json.dumps({"reason": reason}), flush=True)


def _call(option: Option, device: str) -> None:
    broken = import_diffusers()
    if isinstance(option, Attention) and option.package in broken:
        raise ImportError(broken[option.package])
    option.prove(device)


if __name__ == "__main__":
    main(*sys.argv[1:])
