"""What the sweep benchmarks share: ordinary ``fluxrun`` commands run and timed, their records, and what is kept."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEPT = ("sweep.json", "sweep.csv", "report.html")
"""What of a sweep's folder is worth committing: no pictures but the page's small ones."""


@dataclass
class Commands:
    """Runs commands one after the other and remembers each: the line, wall seconds, exit code."""

    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def fluxrun(self, name: str, *arguments: str) -> float:
        """Run one command; a failed one is said, and the next ones still run. Returns its wall seconds."""
        line = shlex.join(["fluxrun", *arguments])
        print(f"\n=== {name}: {line}", flush=True)
        started = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", "fluxrun", *arguments], check=False).returncode
        wall = round(time.perf_counter() - started, 2)
        print(f"=== {name}: exit code {code} after {wall} s", flush=True)
        self.done[name] = {"command": line, "wall_s": wall, "exit_code": code}
        return wall


def read(path: Path) -> dict[str, Any] | None:
    """A JSON file, or None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def statuses(sweep: dict[str, Any]) -> dict[str, int]:
    """How many jobs ended how."""
    found: dict[str, int] = {}
    for job in sweep["jobs"]:
        found[job["status"]] = found.get(job["status"], 0) + 1
    return found


def totals(sweep: dict[str, Any]) -> dict[str, Any]:
    """Where a sweep's seconds went, by its own account."""
    return {
        **{key: round(value, 3) for key, value in sweep["totals"].items()},
        "load_once_plus_jobs_s": round(sweep["totals"]["load_s"] + sweep["totals"]["jobs_s"], 3),
        "jobs": statuses(sweep),
        "why_loaded": sweep["loads"],
    }


def overhead(job: dict[str, Any]) -> dict[str, float]:
    """A job's seconds, and what of them is loading, building, compiling and its first step."""
    return {key: round(job[key] or 0.0, 3) for key in ("total_s", "load_s", "apply_s", "compile_s", "first_call_s")}


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a summary, and print it."""
    text = json.dumps(result, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    print(text)


def keep(out: Path, sweeps: dict[str, Path], files: dict[str, Path]) -> None:
    """Copy what is worth committing from ``out``: the small files of whole ``sweeps``, and single ``files``."""
    for source, target in sweeps.items():
        target.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (out / source / name).exists():
                shutil.copy(out / source / name, target / name)
    for source, target in files.items():
        if (out / source).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(out / source, target)
