"""From Enter to picture: what a run's imports cost, library by library, and the whole process beside `import torch`.

    python scripts/startup.py                                  # fluxrun height=64 width=64 steps=1
    python scripts/startup.py --runs 5 -- vae=tiled steps=4    # another run
    python scripts/startup.py --beside /path/to/another/src    # the same of another checkout, in turns
    python scripts/startup.py --json startup.json

All figures are CPU-seconds (user + system), so that a busy machine changes little; the least of the runs for imports,
the median for whole processes. `leaving` is wall time from the last write of run.json to the process's end.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.machinery import ExtensionFileLoader, SourceFileLoader
from pathlib import Path
from typing import Any

RUN = ("height=64", "width=64", "steps=1")

SHORT = {"plan": ["plan"], "help": ["--help"], "typo": ["hieght=64"]}
"""What is answered without torch; a typo with exit code 2."""

SHOWN = 22
"""Packages in the table; the others are one line."""

SPLIT = ("diffusers", "transformers", "torch", "fluxrun")
"""Packages that are shown with one more level of their names."""


# --- in the traced process --------------------------------------------------------------------------------------------


class Tracer:
    """CPU-seconds of every module's own code, without what it imports; of the thread that imports it."""

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()
        self._stacks = threading.local()

    def install(self) -> None:
        """Stand around what loads a module's code, from Python files and from shared libraries."""
        self._around(SourceFileLoader, "exec_module", lambda module: module.__name__)
        self._around(ExtensionFileLoader, "create_module", lambda spec: spec.name)
        self._around(ExtensionFileLoader, "exec_module", lambda module: module.__name__)

    def _around(self, loader: Any, method: str, name_of: Callable[[Any], str]) -> None:
        original = getattr(loader, method)

        def timed(this: Any, subject: Any) -> Any:
            stack = self._stacks.__dict__.setdefault("inner", [])
            stack.append(0.0)
            started = time.thread_time()
            try:
                return original(this, subject)
            finally:
                spent = time.thread_time() - started
                self.own[name_of(subject)] += spent - stack.pop()
                if stack:
                    stack[-1] += spent

        setattr(loader, method, timed)


def trace(into: str, command: Sequence[str]) -> None:
    """Run `fluxrun` with these arguments, or a statement, in this process; write what its imports took."""
    tracer = Tracer()
    leave = os._exit

    def write() -> None:
        Path(into).write_text(json.dumps(tracer.own))

    def written(code: int) -> None:
        write()
        leave(code)

    atexit.register(write)
    os._exit = written  # type: ignore[assignment]
    sys.path.pop(0)  # this script's folder
    sys.argv = ["fluxrun", *command[1:]]
    tracer.install()
    if command[0] == "fluxrun":
        runpy.run_module("fluxrun", run_name="__main__", alter_sys=True)
    else:
        exec(command[0])


# --- in this one ------------------------------------------------------------------------------------------------------


def cpu_seconds(command: Sequence[str], source: Path | None, folder: Path, expected: int = 0) -> tuple[float, float]:
    """User and system time of a process and its children, and the wall time at which it ended."""
    environment = os.environ | ({"PYTHONPATH": str(source)} if source else {})
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    ended, after = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if child.returncode not in (0, expected):
        raise SystemExit(f"{' '.join(command)} failed:\n{child.stderr}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, ended


def imports_of(command: Sequence[str], source: Path | None, folder: Path, runs: int) -> dict[str, float]:
    """CPU-seconds of each module's own code, of the run in which all of them together took least."""
    found = []
    for number in range(runs):
        file = folder / f"imports_{number}.json"
        cpu_seconds([sys.executable, str(Path(__file__).resolve()), "--trace", str(file), *command], source, folder)
        found.append({str(name): float(spent) for name, spent in json.loads(file.read_text()).items()})
    return min(found, key=lambda own: sum(own.values()))


def grouped(own: dict[str, float]) -> Counter[str]:
    """Seconds by package; of the large ones by their first level."""
    groups: Counter[str] = Counter()
    for name, spent in own.items():
        parts = name.split(".")
        groups[".".join(parts[: 2 if parts[0] in SPLIT else 1])] += spent
    return groups


def leaving(folder: Path, ended: float) -> float:
    """Seconds from the newest run.json to the end of the process that wrote it."""
    return ended - max(file.stat().st_mtime for file in folder.rglob("run.json"))


def measure(source: Path | None, overrides: Sequence[str], runs: int) -> dict[str, Any]:
    """All figures of one checkout (None: of the one that is installed)."""
    fluxrun, torch = [sys.executable, "-m", "fluxrun", *overrides], [sys.executable, "-c", "import torch"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        alone = sum(imports_of(["import torch"], source, folder, runs).values())
        own = imports_of(["fluxrun", *overrides], source, folder, runs)
        whole, torches, left = [], [], []
        short: dict[str, list[float]] = {name: [] for name in SHORT}
        for _ in range(runs):  # in turns: what slows the machine down slows both
            torches.append(cpu_seconds(torch, source, folder)[0])
            spent, ended = cpu_seconds(fluxrun, source, folder)
            whole.append(spent)
            left.append(leaving(folder, ended))
            for name, words in SHORT.items():
                more = overrides if name == "plan" else []
                short[name].append(cpu_seconds([*fluxrun[:3], *words, *more], source, folder, 2)[0])
    ratios = [process / torch for process, torch in zip(whole, torches, strict=True)]
    return {
        "source": str(source or "installed"),
        "imports_s": sum(own.values()),
        "imports_of_torch_alone_s": alone,
        "imports_over_torch": sum(own.values()) / alone,
        "modules": len(own),
        "groups": dict(grouped(own).most_common()),
        "process_s": statistics.median(whole),
        "import_torch_process_s": statistics.median(torches),
        "process_over_torch": statistics.median(ratios),
        "leaving_s": statistics.median(left),
        **{f"{name}_s": statistics.median(spent) for name, spent in short.items()},
    }


def show(found: dict[str, Any]) -> None:
    """The figures of one checkout as text."""
    print(f"\n{found['source']}")
    print(
        f"  imports        {found['imports_s']:5.2f} s  {found['imports_over_torch']:.2f} x `import torch` "
        f"({found['imports_of_torch_alone_s']:.2f} s), {found['modules']} modules"
    )
    print(
        f"  whole process  {found['process_s']:5.2f} s  {found['process_over_torch']:.2f} x `import torch` as one "
        f"({found['import_torch_process_s']:.2f} s)"
    )
    for name in SHORT:
        ratio = found[f"{name}_s"] / found["import_torch_process_s"]
        print(f"  {name:15}{found[f'{name}_s']:5.2f} s  {ratio:.2f} x `import torch`")
    print(f"  leaving        {found['leaving_s']:5.2f} s  (wall)")
    groups = list(found["groups"].items())
    for name, spent in groups[:SHOWN]:
        print(f"    {spent:5.2f}  {name}")
    print(f"    {sum(spent for _, spent in groups[SHOWN:]):5.2f}  {len(groups[SHOWN:])} others")


def main() -> None:
    """Measure, print, and write JSON where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=RUN, help="of the run that is measured")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--beside", type=Path, action="append", default=[], help="the src folder of another checkout")
    parser.add_argument("--source", type=Path, help="the src folder to measure; the installed package otherwise")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [measure(source, options.overrides, options.runs) for source in (options.source, *options.beside)]
    for one in found:
        show(one)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trace"]:
        trace(sys.argv[2], sys.argv[3:])
    else:
        main()
