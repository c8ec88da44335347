"""A real-size sweep on a GPU, the same job alone, and a tuned preset: three ordinary ``fluxrun`` commands, one JSON.

    python benchmarks/gpu_sweep.py OUT                       # klein-4B, random weights, about five minutes on an H100
    python benchmarks/gpu_sweep.py OUT --model tiny          # a dry run on any machine

It answers: does a job in the middle of a sweep have the pixels and the steady step time that it has alone? How long is
it from one job to the next, against a cold start? Does GPU memory between jobs return to the weights' size?
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ALONE = ["attention=sdpa", "compile=regional", "quantization=none", "seed=0"]
"""The job that is also run by itself; in the sweep it comes after others."""
GRID = ["quantization=none,fp8", "attention=xformers,sdpa", "compile=none,regional", "seed=0,1"]


def main() -> None:
    """Run the three commands and write ``gpu_sweep.json``; a failed one is said and the others still run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that is written")
    parser.add_argument("--model", default="flux2_klein_4b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-tune", action="store_true", help="leave the third command out")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    model = [f"model={given.model}", "model.weights=random", f"measure.repeats={given.repeats}"]
    walls = {
        "sweep": fluxrun("--multirun", *model, *GRID, f"hydra.sweep.dir={given.out / 'sweep'}"),
        "alone": fluxrun(*model, *ALONE, f"hydra.run.dir={given.out / 'alone'}"),
    }
    if not given.no_tune:
        preset = ["--output", str(given.out / "preset" / "tuned.yaml"), "--folder", str(given.out / "tune")]
        # On random weights a picture says little about fidelity: the bound only keeps what is plainly broken out.
        walls["tune"] = fluxrun("tune", *preset, "--min-psnr", "10", *model[:2])
        tuned = ["--config-dir", str(given.out), "+preset=tuned", *model, f"hydra.run.dir={given.out / 'tuned'}"]
        walls["tuned"] = fluxrun(*tuned)
    result = {"walls_s": walls, **compare(given.out)}
    (given.out / "gpu_sweep.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def fluxrun(*arguments: str) -> float:
    """Run one command; returns its wall seconds."""
    print("fluxrun", *arguments, flush=True)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "fluxrun", *arguments], check=False)
    wall = round(time.perf_counter() - started, 2)
    print(f"exit {done.returncode} after {wall} s", flush=True)
    return wall


def compare(out: Path) -> dict[str, Any]:
    """The job alone against the same job in the sweep, the time between jobs, and the memory they began with."""
    sweep = _read(out / "sweep" / "sweep.json")
    alone = _read(out / "alone" / "run.json")
    if sweep is None or alone is None:
        return {"problem": "the sweep or the single run left no record"}
    same = next((job for job in sweep["jobs"] if set(ALONE) <= set(job["overrides"])), None)
    kept = [job for job in sweep["jobs"] if job["status"] == "completed" and not job["load_s"]]
    loaded = [job for job in sweep["jobs"] if job["status"] == "completed" and job["load_s"]]
    return {
        "alone_step_s": alone["timings"]["steady_step_s"],
        "in_sweep_step_s": same and same["step_s"],
        "same_pixels": bool(same) and same["images"][0]["sha256"] == alone["images"][0]["sha256"],
        "cold_job_total_s": alone["timings"]["total_s"],
        "job_over_kept_weights_s": {job["job"]: _overhead(job) for job in kept},
        "job_that_loads_s": {job["job"]: _overhead(job) for job in loaded},
        "start_memory_gb": {job["job"]: round((job["start_memory_bytes"] or 0) / 2**30, 3) for job in sweep["jobs"]},
        "peak_memory_gb": {job["job"]: round((job["peak_memory_bytes"] or 0) / 2**30, 3) for job in sweep["jobs"]},
        "status": {job["job"]: job["status"] for job in sweep["jobs"]},
        "loads": sweep["loads"],
        "settings": sweep["settings"],
        "environments": sweep["environments"],
    }


def _overhead(job: dict[str, Any]) -> dict[str, float]:
    """A job's seconds, and what of them is its first step (compiling) and its building."""
    return {key: round(job[key] or 0.0, 3) for key in ("total_s", "load_s", "apply_s", "compile_s", "first_call_s")}


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    main()
