"""A real-size sweep on a GPU, one of its jobs alone, ``fluxrun tune``, and a run with the preset it wrote.

    python benchmarks/gpu_sweep.py OUT                       # klein-4B, random weights, about four minutes on an H100
    python benchmarks/gpu_sweep.py OUT --model tiny          # a dry run on any machine
    python benchmarks/gpu_sweep.py OUT --parts tune          # one of the two parts

It answers: does a job in the middle of a sweep have the pixels and the steady step time that it has alone? How long is
it from one job to the next, against a cold start? Does GPU memory between jobs return to the weights' size? What does
tune choose, and does a run with its preset draw as fast?
Worth keeping from OUT: gpu_sweep.json; sweep.json, sweep.csv and report.html of sweep/ and tune/; preset/.
"""

from functools import partial
from pathlib import Path

from bench.sweeps import Found, fluxrun, main, swept, totals, tune
from fluxrun.record.folder import read_record

ALONE = ("attention=sdpa", "compile=regional", "quantization=none")
"""The job that is also run by itself; in the sweep it comes after others."""
GRID = ("quantization=none,fp8", "attention=xformers,sdpa", "compile=none,regional")
COMMON = ("model.weights=random", "measure.repeats=3")
SPENT = {"total_s", "load_s", "apply_s", "compile_s", "first_call_s", "start_memory_bytes", "peak_memory_bytes"}


def sweep(out: Path, model: str) -> Found:
    """The sweep, and the job alone: pixels, steps, and each job's seconds and memory."""
    together = fluxrun("--multirun", model, *COMMON, *GRID, f"hydra.sweep.dir={out / 'sweep'}")
    alone = fluxrun(model, *COMMON, *ALONE, f"hydra.run.dir={out / 'alone'}")
    result, record = swept(out / "sweep"), read_record(out / "alone")
    done = {" ".join(job.overrides): job for job in result.jobs if job.status == "completed"}
    same = next((job for job in done.values() if set(ALONE) <= set(job.overrides)), None)
    return {
        "sweep": {**together, "account": totals(result), "environments": result.environments},
        "jobs": {name: job.model_dump(include=SPENT) for name, job in done.items()},
        "alone": {**alone, **record.timings.model_dump(include={"total_s", "steady_step_s"})},
        "in_sweep_step_s": same and same.step_s,
        "same_pixels": same is not None and [i.sha256 for i in record.images] == [i.sha256 for i in same.images],
    }


if __name__ == "__main__":
    # On random weights a picture says little about fidelity: the bound only keeps what is plainly broken out.
    search = partial(tune, flags=("--min-psnr", "10", "--minutes", "1.5", "--repeats", "3"), overrides=COMMON)
    main(__doc__ or "", "gpu_sweep.json", "flux2_klein_4b", {"sweep": sweep, "tune": search})
