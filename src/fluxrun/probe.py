"""Proof by doing: one real kernel call in a child process, remembered by versions, driver and GPU.

``python -m fluxrun.probe GROUP NAME`` is the child; a crash of the kernel ends the child, never the run.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fluxrun.paths import cache_dir

if TYPE_CHECKING:
    from fluxrun.machine import Machine, Proof

PROBE_SECONDS = 120
PROBED_PACKAGES = (
    "torch",
    "diffusers",
    "xformers",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "sageattention",
    "kernels",
    "nvidia-cudnn-frontend",
)


def fingerprint(machine: Machine) -> str:
    """What a proof depends on: library versions, driver and GPUs."""
    versions = {name: machine.packages.get(name) for name in PROBED_PACKAGES}
    parts = [machine.python, machine.driver, [gpu.name for gpu in machine.gpus], versions]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def remembered(machine: Machine) -> Mapping[str, Proof]:
    """Proofs made earlier with the same versions, driver and GPUs."""
    from fluxrun.machine import Proof

    try:
        stored = json.loads(_file(machine).read_text())
    except (FileNotFoundError, json.JSONDecodeError, PermissionError):
        return {}
    return {name: Proof(**proof) for name, proof in stored.items()}


def prove(machine: Machine, group: str, name: str) -> Proof:
    """Run the probe of an option in a child process and remember the result.

    The child imports torch and diffusers (seconds), calls the kernel once at head size 128 and ends.
    """
    from fluxrun.machine import Proof
    from fluxrun.record import write_atomically

    command = [sys.executable, "-m", "fluxrun.probe", group, name, machine.device]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        reason = _reason(child.returncode, child.stdout, child.stderr)
    except subprocess.TimeoutExpired:
        reason = f"the probe did not end within {PROBE_SECONDS} s"
    proof = Proof(reason, datetime.now(UTC).isoformat(timespec="seconds"))
    proofs = {**remembered(machine), f"{group}={name}": proof}
    _file(machine).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(_file(machine), json.dumps({key: vars(value) for key, value in proofs.items()}, indent=1))
    return proof


def _reason(code: int, stdout: str, stderr: str) -> str | None:
    lines = [line for line in stdout.splitlines() if line.startswith("{")]
    if lines:
        return json.loads(lines[-1])["reason"]
    tail = [line for line in stderr.splitlines() if line.strip()]
    return f"the probe died with exit code {code}: {tail[-1][:200] if tail else 'no message'}"


def _file(machine: Machine):  # type: ignore[no-untyped-def]
    return cache_dir() / "probes" / f"{fingerprint(machine)}.json"


def main(group: str, name: str, device: str) -> None:
    """The child: call the option's kernel once and print ``{"reason": …}``."""
    reason = None
    try:
        _call(group, name, device)
    except BaseException as error:  # whatever a library throws, also SystemExit, is the finding here
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
    print(json.dumps({"reason": reason}), flush=True)


def _call(group: str, name: str, device: str) -> None:
    from fluxrun.catalog import Catalog
    from fluxrun.options.attention import Attention
    from fluxrun.state import import_diffusers

    option = Catalog().load(group, name)
    if not isinstance(option, Attention):
        raise TypeError(f"{group}={name} has no probe")
    broken = import_diffusers()
    if option.package in broken:
        raise ImportError(broken[option.package])
    option.prove(device)


if __name__ == "__main__":
    main(*sys.argv[1:4])
