"""Everything a sweep promises, shown on a CPU with the bundled model; ordinary ``fluxrun`` commands, one JSON summary.

    python benchmarks/cpu_sweep.py OUT                                # about four minutes on two idle cores
    python benchmarks/cpu_sweep.py OUT --parts kill,sweep --repeats 1 # only some of it
    python benchmarks/cpu_sweep.py OUT --keep benchmarks/results      # also copies what is committed

``kill``: a 2x3x2 sweep is killed (SIGKILL) in the middle and resumed: every job once, none lost.
``sweep``: the same sweep undisturbed; its total against loading once and the jobs, and against a process per job.
Half of its jobs are invalid (``steps=0``), and one of the others asks for two options that do not go together, with
``strict=true``, which allows no fallback.
``tune``: ``fluxrun tune``, and a run with the preset it wrote.

The kill comes first, so that the other sweeps find the same compiled kernels in the cache, whichever runs first.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from sweep_commands import Commands, keep, read, statuses, totals, write

GRID = ["compile=none,regional,default", "cache=none,fixed", "steps=2,0", "cache.force=true", "strict=true"]
"""Twelve jobs: six with steps=0, and of the others compile=default with cache=fixed, which strict=true refuses."""
EXPECTED = {"completed": 5, "failed": 7}
PARTS = ("kill", "sweep", "tune")
PATIENCE_S = 300


def main() -> None:
    """Run the parts and write ``cpu_sweep.json``; with ``--keep`` also what is committed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that is written; a new one")
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--repeats", type=int, default=4, help="times each image is drawn")
    parser.add_argument("--parts", default=",".join(PARTS), help="of kill,sweep,tune")
    parser.add_argument("--keep", type=Path, help="results folder to copy the small files to")
    given = parser.parse_args()
    parts = given.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {', '.join(sorted(unknown))}: of {', '.join(PARTS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    grid = ["--multirun", f"model={given.model}", *GRID, f"measure.repeats={given.repeats}"]
    result = read(given.out / "cpu_sweep.json") or {}
    if "kill" in parts:
        result["killed_and_resumed"] = killed_and_resumed(given.out / "killed", grid)
    if "sweep" in parts:
        result["sweep"] = one_process_and_many(given.out, grid)
    if "tune" in parts:
        result["tune"] = tuned(given.out, given.model, given.repeats)
    write(given.out / "cpu_sweep.json", result)
    if given.keep:
        _keep(given.out, given.keep, given.model)


# --- killed and resumed ---------------------------------------------------------------------------------------------


def killed_and_resumed(folder: Path, grid: list[str]) -> dict[str, Any]:
    """Kill a sweep while its third job that can complete is running, and run it again in the same folder."""
    command = [*grid, f"hydra.sweep.dir={folder}"]
    print("\n=== kill: fluxrun", *command, flush=True)
    child = subprocess.Popen([sys.executable, "-m", "fluxrun", *command])
    before = _wait_for_the_middle(child, folder)
    helpers = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = psutil.wait_procs(helpers, timeout=30)[1]
    stopped = read(folder / "sweep.json") or {}
    commands = Commands()
    commands.fluxrun("resumed", *grid, f"sweep.resume={folder}")
    after = read(folder / "sweep.json")
    assert after is not None, f"{folder} holds no sweep.json"
    jobs = sorted(int(job["job"]) for job in after["jobs"])
    kept = {name: run for name, run in before.items() if _run_id(folder / name) == run}
    found = {
        "killed_at": {"sweep.json": stopped.get("status"), "jobs": statuses(stopped) if stopped else {}},
        "processes_left_behind": len(left),
        "jobs": statuses(after),
        "every_job_once": jobs == list(range(12)),
        "completed_before_and_kept": sorted(kept, key=int),
        "completed_before": sorted(before, key=int),
        "unfinished_attempts_set_aside": sorted(p.name for p in (folder / "earlier").iterdir()),
        **commands.done,
    }
    good = found["every_job_once"] and kept == before and not left and statuses(after) == EXPECTED
    return {"as_it_should_be": good, **found}


def _wait_for_the_middle(child: subprocess.Popen[bytes], folder: Path) -> dict[str, str]:
    """Until two jobs are completed and a third is running; the completed ones' run ids by folder."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and child.poll() is None:
        records = {path.parent.name: read(path) or {} for path in folder.glob("*/run.json")}
        states = [record["status"] for record in records.values()]
        if states.count("completed") >= 2 and "running" in states:
            return {name: r["run_id"] for name, r in records.items() if r["status"] == "completed"}
        time.sleep(0.05)
    raise SystemExit(f"the sweep in {folder} was over, or stuck, before it could be killed")


def _run_id(folder: Path) -> str | None:
    record = read(folder / "run.json")
    return record and record["run_id"]


# --- one process, a process per job ---------------------------------------------------------------------------------


def one_process_and_many(out: Path, grid: list[str]) -> dict[str, Any]:
    """The same sweep in one process and with a process for each job: wall seconds of the whole commands."""
    commands = Commands()
    one = commands.fluxrun("one_process", *grid, f"hydra.sweep.dir={out / 'sweep'}")
    many = commands.fluxrun("process_per_job", *grid, "sweep.isolation=process", f"hydra.sweep.dir={out / 'process'}")
    results = {name: read(out / name / "sweep.json") for name in ("sweep", "process")}
    assert all(results.values()), f"a sweep in {out} left no sweep.json"
    found = {name: totals(result) for name, result in results.items() if result is not None}
    account = found["sweep"]
    print(
        f"\none process: {one} s for the whole command, of which loading once {account['load_s']} s + jobs "
        f"{account['jobs_s']} s = {account['load_once_plus_jobs_s']} s; the rest is Python, torch and the report. "
        f"A process per job: {many} s, {many / one:.2f} times as long.",
        flush=True,
    )
    return {
        "as_it_should_be": all(f["jobs"] == EXPECTED for f in found.values()) and account["loads"] == 1,
        **commands.done,
        "one_process_totals": account,
        "process_per_job_totals": found["process"],
        "process_per_job_over_one_process": round(many / one, 2),
    }


# --- tune -----------------------------------------------------------------------------------------------------------


def tuned(out: Path, model: str, repeats: int) -> dict[str, Any]:
    """Search, and run the preset that was written."""
    commands = Commands()
    preset = out / "preset" / f"{model}_cpu.yaml"
    files = ["--output", str(preset), "--folder", str(out / "tune")]
    commands.fluxrun("tune", "tune", f"model={model}", *files, "--repeats", str(max(2, repeats)))
    use = ["--config-dir", str(out), f"+preset={preset.stem}", f"model={model}", f"measure.repeats={repeats}"]
    commands.fluxrun("run", *use, f"hydra.run.dir={out / 'tuned'}")
    run, search = read(out / "tuned" / "run.json"), read(out / "tune" / "sweep.json")
    assert run is not None, "the preset's run left no record"
    assert search is not None, "tune left no table"
    steady = run["timings"]["steady_step_s"]
    return {
        "as_it_should_be": run["status"] == "completed",
        **commands.done,
        "tried": statuses(search),
        "preset": {group: option["effective"] for group, option in run["options"].items()},
        "fallbacks": [group for group, option in run["options"].items() if option["fallbacks"]],
        "step_s": steady and steady["median"],
    }


def _keep(out: Path, results: Path, model: str) -> None:
    sweep, tune = results / f"{model}_sweep_cpu", results / f"{model}_tune_cpu"
    keep(
        out,
        {"sweep": sweep, "tune": tune},
        {
            "cpu_sweep.json": sweep / "summary.json",
            f"preset/{model}_cpu.yaml": tune / "preset" / f"{model}_cpu.yaml",
            "tuned/run.json": tune / "run.json",
        },
    )


if __name__ == "__main__":
    main()
