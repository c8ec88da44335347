"""What loading the weights once saves: the same sweep in one process, and with a process for every job.

    python benchmarks/sweep_overhead.py model=shapes --output benchmarks/results/sweep_overhead_cpu.json

Both are ordinary ``fluxrun --multirun`` commands into temporary folders; the second has ``sweep.isolation=process``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GRID = ["attention=sdpa,math", "compile=none", "steps=2,0", "seed=0,1"]
"""Eight jobs, half of them invalid, as people type them."""


def main() -> None:
    """Run both, print one line of JSON and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given, overrides = parser.parse_known_args()
    grid = [*GRID, *overrides]
    with tempfile.TemporaryDirectory() as folder:
        one = sweep(grid, Path(folder) / "one")
        each = sweep([*grid, "sweep.isolation=process"], Path(folder) / "each")
    if not one["completed"] or one["completed"] != each["completed"]:
        raise SystemExit(f"nothing to compare: {one['completed']} and {each['completed']} jobs completed")
    result = {
        "grid": grid,
        "one_process": one,
        "process_per_job": each,
        "ratio": round(each["wall_s"] / one["wall_s"], 2),
        "environment": one.pop("environment"),
    }
    each.pop("environment")
    text = json.dumps(result, indent=1)
    if given.output:
        given.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"one process per job takes {result['ratio']} times as long as one process for all")


def sweep(overrides: list[str], folder: Path) -> dict[str, Any]:
    """One sweep: wall seconds of the whole command, and where they went."""
    command = [sys.executable, "-m", "fluxrun", "--multirun", *overrides, f"hydra.sweep.dir={folder}"]
    started = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wall = time.perf_counter() - started
    if not (folder / "sweep.json").exists():
        raise SystemExit(f"{' '.join(command)} wrote no sweep.json:\n{done.stderr[-2000:]}")
    result = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    jobs = result["jobs"]
    return {
        "wall_s": round(wall, 2),
        "exit_code": done.returncode,
        "jobs": len(jobs),
        "completed": sum(job["status"] == "completed" for job in jobs),
        "loads": result["totals"]["loads"],
        "load_s": round(result["totals"]["load_s"], 3),
        "jobs_without_loading_s": round(result["totals"]["jobs_s"], 2),
        "job_total_s": {job["job"]: round(job["total_s"], 2) for job in jobs if job["status"] == "completed"},
        "environment": result["environments"][0] if result["environments"] else {},
    }


if __name__ == "__main__":
    main()
