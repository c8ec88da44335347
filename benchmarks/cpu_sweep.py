"""Everything a sweep promises, shown on a CPU with the bundled model; ordinary ``fluxrun`` commands, one JSON summary.

    python benchmarks/cpu_sweep.py OUT                       # about four minutes on two idle cores
    python benchmarks/cpu_sweep.py OUT --parts kill,sweep    # only some of it

``kill``: a 2x3x2 sweep is killed (SIGKILL) in the middle and resumed: every job once, none lost.
``sweep``: the same undisturbed, against loading once and the jobs, and against a process per job. Half of its jobs are
invalid (``steps=0``), and one asks for two options that do not go together, with ``strict=true``.
``tune``: ``fluxrun tune``, and a run with the preset it wrote.

The kill comes first, so that the other sweeps find the same compiled kernels in the cache, whichever runs first.
Worth keeping from OUT: cpu_sweep.json; sweep.json, sweep.csv and report.html of sweep/ and tune/; preset/.
"""

import subprocess
import time
from functools import partial
from pathlib import Path

import psutil

from bench.command import FLUXRUN, environment
from bench.sweeps import Found, fluxrun, main, statuses, swept, totals, tune
from fluxrun.record.folder import read_record

REPEATS = "measure.repeats=4"
GRID = ("compile=none,regional,default", "cache=none,fixed", "steps=2,0", "cache.force=true", "strict=true", REPEATS)
"""Twelve jobs: six with steps=0, and of the others compile=default with cache=fixed, which strict=true refuses."""
EXPECTED = {"completed": 5, "failed": 7}


def kill(out: Path, model: str) -> Found:
    """Kill a sweep while its third job that can complete is running, and run it again in the same folder."""
    folder, grid = out / "killed", ("--multirun", model, *GRID)
    child = subprocess.Popen([*FLUXRUN, *grid, f"hydra.sweep.dir={folder}"], env=environment())
    before = _middle(child, folder)
    helpers = psutil.Process(child.pid).children(recursive=True)
    child.kill()
    child.wait()
    left = psutil.wait_procs(helpers, timeout=30)[1]
    stopped = swept(folder)
    resumed = fluxrun(*grid, f"sweep.resume={folder}")
    after, runs = swept(folder), _runs(folder, "completed")
    once = sorted(int(job.job) for job in after.jobs) == list(range(12)) and before.items() <= runs.items()
    return {
        "as_it_should_be": once and not left and statuses(after) == EXPECTED,
        "killed_at": {"sweep.json": stopped.status, "jobs": statuses(stopped)},
        "processes_left_behind": len(left),
        "jobs": statuses(after),
        "completed_before": sorted(before, key=int),
        "unfinished_attempts_set_aside": sorted(path.name for path in (folder / "earlier").iterdir()),
        "resumed": resumed,
    }


def _middle(child: subprocess.Popen[bytes], folder: Path) -> dict[str, str]:
    """Until two jobs are completed and a third is running; the completed ones' run ids by folder."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and child.poll() is None:
        if len(done := _runs(folder, "completed")) >= 2 and _runs(folder, "running"):
            return done
        time.sleep(0.05)
    raise SystemExit(f"the sweep in {folder} was over, or stuck, before it could be killed")


def _runs(folder: Path, status: str) -> dict[str, str]:
    records = {path.parent.name: read_record(path.parent) for path in folder.glob("*/run.json")}
    return {name: record.run_id for name, record in records.items() if record.status == status}


def sweep(out: Path, model: str) -> Found:
    """The same sweep in one process and with a process for each job: wall seconds of the whole commands."""
    grid = ("--multirun", model, *GRID)
    one = fluxrun(*grid, f"hydra.sweep.dir={out / 'sweep'}")
    many = fluxrun(*grid, "sweep.isolation=process", f"hydra.sweep.dir={out / 'process'}")
    alone, each = totals(swept(out / "sweep")), totals(swept(out / "process"))
    return {
        "as_it_should_be": alone["jobs"] == each["jobs"] == EXPECTED and alone["loads"] == 1,
        "one_process": {**one, "account": alone},
        "process_per_job": {**many, "account": each},
        "process_per_job_over_one_process": round(many["wall_s"] / one["wall_s"], 2),
    }


if __name__ == "__main__":
    search = partial(tune, flags=("--repeats", "4"), overrides=(REPEATS,))
    main(__doc__ or "", "cpu_sweep.json", "shapes", {"kill": kill, "sweep": sweep, "tune": search})
