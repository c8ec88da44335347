"""A real-size sweep on a GPU, one of its jobs alone, ``fluxrun tune``, and a run with the preset it wrote.

    python benchmarks/gpu_sweep.py OUT                       # klein-4B, random weights, about four minutes on an H100
    python benchmarks/gpu_sweep.py OUT --model tiny          # a dry run on any machine
    python benchmarks/gpu_sweep.py OUT --parts tune          # one of the two parts
    python benchmarks/gpu_sweep.py OUT --keep benchmarks/results --name klein4b   # also copies what is committed

It answers: does a job in the middle of a sweep have the pixels and the steady step time that it has alone? How long is
it from one job to the next, against a cold start? Does GPU memory between jobs return to the weights' size? What does
tune choose, and does a run with its preset draw as fast?
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sweep_commands import Commands, keep, overhead, read, statuses, totals, write

ALONE = ["attention=sdpa", "compile=regional", "quantization=none"]
"""The job that is also run by itself; in the sweep it comes after others."""
GRID = ["quantization=none,fp8", "attention=xformers,sdpa", "compile=none,regional"]
GB = 2**30


def main() -> None:
    """Run the commands and write ``gpu_sweep.json``; a failed one is said and the others still run."""
    given = _arguments()
    out = given.out
    out.mkdir(parents=True, exist_ok=True)
    model = [f"model={given.model}", "model.weights=random"]
    repeats = [f"measure.repeats={given.repeats}"]
    commands = Commands()
    if "sweep" in given.parts:
        commands.fluxrun("sweep", "--multirun", *model, *repeats, *GRID, f"hydra.sweep.dir={out / 'sweep'}")
        write(out / "gpu_sweep.json", summary(commands, out))  # should the machine be taken away meanwhile
        commands.fluxrun("alone", *model, *repeats, *ALONE, f"hydra.run.dir={out / 'alone'}")
    if "tune" in given.parts:
        preset = out / "preset" / "tuned.yaml"
        # On random weights a picture says little about fidelity: the bound only keeps what is plainly broken out.
        bounds = ["--min-psnr", "10", "--minutes", str(given.tune_minutes), "--repeats", "3"]
        commands.fluxrun("tune", "tune", *bounds, "--output", str(preset), "--folder", str(out / "tune"), *model)
        tuned = ["--config-dir", str(out), "+preset=tuned", *model, *repeats]
        commands.fluxrun("tuned", *tuned, f"hydra.run.dir={out / 'tuned'}")
    write(out / "gpu_sweep.json", summary(commands, out))
    if given.keep:
        _keep(out, given.keep, given.name, given.machine, given.parts)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that is written")
    parser.add_argument("--model", default="flux2_klein_4b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tune-minutes", type=float, default=1.5, help="after so many, tune begins no further option")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["sweep", "tune"], help="sweep,tune")
    parser.add_argument("--keep", type=Path, help="results folder to copy the small files to")
    parser.add_argument("--name", default="klein4b", help="the kept folders: NAME_sweep_MACHINE, NAME_tune_MACHINE")
    parser.add_argument("--machine", default="h100", help="what the kept folders call this GPU")
    return parser.parse_args()


def summary(commands: Commands, out: Path) -> dict[str, Any]:
    """Everything measured, from the records."""
    sweep, alone = read(out / "sweep" / "sweep.json"), read(out / "alone" / "run.json")
    found: dict[str, Any] = {"commands": commands.done}
    if sweep is not None:
        found["sweep"] = _sweep(sweep)
        if alone is not None:
            found["alone"] = _compare(sweep, alone)
    if (tuned := read(out / "tuned" / "run.json")) is not None:
        found["tuned"] = _tuned(out, tuned)
    return found


def _sweep(sweep: dict[str, Any]) -> dict[str, Any]:
    """The time between jobs, and the memory they began with."""
    done = [job for job in sweep["jobs"] if job["status"] == "completed"]
    return {
        **totals(sweep),
        "job_over_kept_weights_s": {_label(job): overhead(job) for job in done if not job["load_s"]},
        "job_that_loads_s": {_label(job): overhead(job) for job in done if job["load_s"]},
        "start_memory_gb": {_label(job): round((job["start_memory_bytes"] or 0) / GB, 3) for job in done},
        "peak_memory_gb": {_label(job): round((job["peak_memory_bytes"] or 0) / GB, 3) for job in done},
        "environments": sweep["environments"],
    }


def _compare(sweep: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """The job alone against the same job in the sweep."""
    same = next((job for job in sweep["jobs"] if set(ALONE) <= set(job["overrides"])), None)
    drawn = bool(same and same["images"] and alone["images"])
    steady = alone["timings"]["steady_step_s"]
    return {
        "job": same and same["job"],
        "alone_step_s": steady and steady["median"],
        "in_sweep_step_s": same and same["step_s"],
        "same_pixels": drawn and same is not None and same["images"][0]["sha256"] == alone["images"][0]["sha256"],
        "cold_job_total_s": alone["timings"]["total_s"],
    }


def _tuned(out: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What tune chose and measured, and what the run with its preset then did."""
    searched = read(out / "tune" / "sweep.json")
    steady = run["timings"]["steady_step_s"]
    return {
        "ran_with": {group: option["effective"] for group, option in run["options"].items()},
        "fallbacks": {group: option["fallbacks"] for group, option in run["options"].items() if option["fallbacks"]},
        "step_s": steady and steady["median"],
        "denoise_s": run["timings"]["denoise_s"],
        "decode_s": run["timings"]["decode_s"],
        "search": searched and {"seconds": searched["totals"]["wall_s"], "jobs": statuses(searched)},
    }  # fmt: skip


def _label(job: dict[str, Any]) -> str:
    keys = {value.partition("=")[0] for value in GRID}
    return " ".join(o for o in job["overrides"] if o.partition("=")[0] in keys)


def _keep(out: Path, results: Path, name: str, machine: str, parts: Sequence[str]) -> None:
    """Copy each part's small files into its folder; the summary goes along with the first."""
    folders = {part: results / f"{name}_{part}_{machine}" for part in parts}
    files = {"gpu_sweep.json": folders[parts[0]] / "summary.json"}
    if "tune" in parts:
        files |= {
            "preset/tuned.yaml": folders["tune"] / "preset" / "tuned.yaml",
            "tuned/run.json": folders["tune"] / "run.json",
        }
    keep(out, folders, files)


if __name__ == "__main__":
    main()
