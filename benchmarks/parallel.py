"""Measures one picture on two GPUs beside one: step latency, error, memory, and how soon a lost process is recorded.

    python benchmarks/parallel.py OUT.json                      # klein-4B and dev at real size, two GPUs: 7 minutes
    python benchmarks/parallel.py OUT.json --budget 300         # begins no row after that many seconds
    python benchmarks/parallel.py OUT.json --only klein dev     # rows with one of these in their names
    python benchmarks/parallel.py OUT.json --tiny               # a dry run on a CPU

Random weights, random prompt embeddings, no text encoder. The rows are measured by the processes of one torchrun; on
one GPU the first one measures while the others wait. Each row's steps are timed by events on the GPU; the error is the
relative L2 of the first step's output to one GPU's, with the same options. Rows named "diffusers" are its own recipe.
A row that hangs is given up, and the next ones have new processes. OUT.json is written after each row.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import bench  # this checkout's fluxrun
from bench.results import Row
from bench.section import gpu_state
from bench.settings import MODELS, TINY_MODELS
from fluxrun.atomic import write_atomically
from fluxrun.hardware.detection import detect
from fluxrun.record.environment import git_commit
from fluxrun.record.folder import read_record

T = TypeVar("T")

RECIPE = "diffusers"
OPTIONS = {
    "lossless": ["+preset=h100_lossless"],
    "lossless-no-graph": ["+preset=h100_lossless", "compile.targets=[vae_decoder]"],
    "fast": ["+preset=h100_fast"],
    RECIPE: [],
}
ROWS = (
    ("klein_4b", 1024, "lossless", ("single", "ulysses", "tensor")),
    ("dev", 1024, "lossless", ("single", "ulysses")),
    ("dev", 1024, "fast", ("single", "ulysses")),
    ("klein_4b", 1024, "fast", ("single", "ulysses")),
    ("klein_4b", 1024, "lossless-no-graph", ("ulysses",)),
    ("klein_4b", 1024, RECIPE, ("single", "ulysses", "tensor")),
    ("dev", 1024, "lossless", ("tensor", "ring")),
    ("dev", 1024, RECIPE, ("single", "ulysses", "tensor")),
    ("dev", 2048, "lossless", ("single", "ulysses", "tensor")),
    ("klein_9b", 1024, "lossless", ("single", "ulysses")),
    ("klein_9b", 2048, "lossless", ("single", "ulysses")),
    ("klein_9b", 1024, "fast", ("single", "ulysses")),
    ("dev", 2048, "fast", ("single", "ulysses")),
)
"""Model, edge in pixels, options, and by what it is drawn, in order of importance."""
SHOWN = ("name", "median_ms", "rel_l2", "error", "peak_gb")
ROW_S = 100.0
"""The longest a row may take."""
START_S = 90.0
"""The same until the first one begins."""
STEPS = {"dev": 6}
"""Of a call, else 10; the first one is not counted."""


def names() -> list[str]:
    """Every row, by name: ``dev 1024 fast ulysses``."""
    return [f"{model} {edge} {options} {engine}" for model, edge, options, engines in ROWS for engine in engines]


# --- in each of torchrun's processes --------------------------------------------------------------------------------


def measure_all(rows: Sequence[str], out: Path, *, tiny: bool) -> None:
    """Measure rows, the processes together; the first one appends a line of JSON to ``out`` for each."""
    from fluxrun.process.ranks import Group
    from fluxrun.weights.store import WeightStore

    if tiny:
        sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
        from drawn_together import allow_it

        allow_it()
    device = detect().on("auto").device
    group, store = Group.join(device, 3), WeightStore()
    references: dict[str, Any] = {}
    for name in rows:
        started = time.monotonic()
        try:
            row = measured(name, group, store, references, tiny)
        except Exception as error:  # one row's; the others may be measured
            row = {"error": f"{type(error).__name__}: {error}"[:500]}
        every = group.gather(row)
        row = next((one for one in every if "error" in one), every[0])
        row |= {"name": name, "peak_gb": [one.get("peak_gb") for one in every], "seconds": time.monotonic() - started}
        if group.rank == 0:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, default=str) + "\n")
    group.gather(None)
    os._exit(0)


def measured(name: str, group: Any, store: Any, references: dict[str, Any], tiny: bool) -> Row:
    """One row's figures; the processes that have nothing to do return at once."""
    import torch

    model, edge, options, engine = name.split()
    if engine == "single" and group.rank:
        return {}
    subject = Ours(name, group, store, tiny)
    try:
        first_s, _ = subject.timed(lambda: subject.first(subject.step_ms))
        subject.step_ms()  # recorded as a CUDA graph by now
        samples = [subject.step_ms()[1:] for _ in range(2)]
        output = subject.first_step().float().cpu()
        about = f"{model} {edge} {options.partition('-')[0]}"
        if engine == "single":
            references[about] = output
        reference = references.get(about)
        error = None if reference is None else float((output - reference).norm() / reference.norm())
        equal = None if reference is None else bool(torch.equal(output, reference))
        return {
            "step_ms": [round(ms, 3) for sample in samples for ms in sample],
            "median_ms": round(statistics.median([ms for sample in samples for ms in sample]), 3),
            "first_call_s": round(first_s, 2), "rel_l2": error, "equal_bits": equal, **subject.facts(),
        }  # fmt: skip
    finally:
        subject.close()


def Ours(name: str, group: Any, store: Any, tiny: bool) -> Any:
    """A subject that a group of processes draws together."""
    from bench.plain import plain_pipeline
    from bench.subject import Subject
    from fluxrun.config.composition import compose
    from fluxrun.planning.prepare import prepare
    from fluxrun.process.device import free_memory
    from fluxrun.process.ranks import ALONE
    from fluxrun.runner import assembled

    model, edge, options, engine = name.split()
    size = ["height=64", "width=64", "model.max_sequence_length=32"] if tiny else [f"height={edge}", f"width={edge}"]
    weights, steps = (TINY_MODELS if tiny else MODELS)[model], f"steps={STEPS.get(model, 10)}"
    overrides = [*weights, *size, *OPTIONS[options], steps]

    class Together(Subject):
        """bench's subject, built by all processes."""

        def __init__(self) -> None:
            prepared = prepare(compose([*overrides, f"parallel={engine}", "memory=staged"]))
            self.plan, self.device = prepared.plan, prepared.plan.machine.device
            ranks = ALONE if engine == "single" else group
            self.session = None
            if options == RECIPE:
                store.clear()
                self._plain = plain_pipeline(self.plan, self.device, text_encoder=False)
                if engine != "single":
                    _share(self._plain.transformer, engine, group)
                self._plain.transformer.compile_repeated_blocks(fullgraph=engine == "single")
            else:
                self.session = assembled(prepared, ranks=ranks, store=store)
            free_memory()
            self.peak_gb()

        def first(self, call: Callable[[], T]) -> T:
            while True:
                value, error = None, None
                try:
                    value = call()
                except Exception as raised:  # what it was is the session's business
                    error = raised
                if self.session is not None:
                    error = self.session.agreed(error)
                if error is None:
                    return value  # type: ignore[return-value]
                if self.session is None:
                    raise error
                self.session.recover(error)

        def close(self) -> None:
            if self.session is not None:
                self.session.close()
            else:
                del self._plain
                __import__("torch").compiler.reset()
            free_memory()

    return Together()


def _share(transformer: Any, engine: str, group: Any) -> None:
    """diffusers' own way."""
    from diffusers import ContextParallelConfig, TensorParallelConfig

    if engine == "tensor":
        transformer.enable_parallelism(config=TensorParallelConfig(tp_degree=group.size))
    else:
        transformer.enable_parallelism(config=ContextParallelConfig(**{f"{engine}_degree": group.size}))


# --- from outside -----------------------------------------------------------------------------------------------------


def torchrun(rows: Sequence[str], lines: Path, log: Path, *, tiny: bool) -> subprocess.Popen[bytes]:
    """Processes that measure these rows."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--local-addr=127.0.0.1",
        __file__, str(lines), "--measure", json.dumps(rows), *(["--tiny"] if tiny else []),
    ]  # fmt: skip
    with log.open("ab") as words:
        return subprocess.Popen(command, stdout=words, stderr=words, start_new_session=True, env=environment())


def environment() -> dict[str, str]:
    """Of the processes: no multicast (NVLS), which a shared host may not be able to offer."""
    path = os.pathsep.join(filter(None, [str(bench.ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "NCCL_NVLS_ENABLE": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "8"),
    }


def measure_outside(rows: list[str], out: dict[str, Any], save: Callable[[], None], end: float, *, tiny: bool) -> None:
    """Have the rows measured, by new processes after one that hangs."""
    with tempfile.TemporaryDirectory(prefix="fluxrun-parallel-") as name:
        while rows and time.monotonic() < end:
            lines, log = Path(name) / "rows.jsonl", Path(name) / "log.txt"
            lines.write_text("")
            running, seen, since = torchrun(rows, lines, log, tiny=tiny), 0, time.monotonic()
            while running.poll() is None and time.monotonic() < end:
                time.sleep(0.5)
                found = [json.loads(line) for line in lines.read_text().splitlines()]
                if len(found) > seen:
                    seen, since = len(found), time.monotonic()
                    print(
                        *(found[-1].get(key) for key in ("name", "median_ms", "rel_l2", "error", "peak_gb")), flush=True
                    )
                    out["rows"] |= {row["name"]: row for row in found}
                    save()
                if time.monotonic() - since > ROW_S + (START_S if seen == 0 else 0):
                    break
            kill(running)
            found = [json.loads(line) for line in lines.read_text().splitlines()]
            out["rows"] |= {row["name"]: row for row in found}
            rows = rows[len(found) :]
            if rows and time.monotonic() < end:
                tail = log.read_text(errors="replace")[-3000:]
                out["rows"][rows[0]] = {"name": rows[0], "error": "hung, or ended its process", "log": tail}
                rows = rows[1:]
            save()
    for row in rows:
        out["rows"].setdefault(row, {"name": row, "error": "out of time"})


def kill(running: subprocess.Popen[bytes]) -> None:
    """torchrun and all below it."""
    import psutil

    if running.poll() is None:
        for process in [*psutil.Process(running.pid).children(recursive=True), psutil.Process(running.pid)]:
            process.kill()
    running.wait()


def lost_process(*, tiny: bool, number: signal.Signals = signal.SIGKILL) -> Row:
    """Seconds from a process's SIGKILL to the record that says so; fluxrun as a user starts it."""
    model = [*TINY_MODELS["klein_4b"], "height=64", "width=64"] if tiny else [*MODELS["klein_4b"], *OPTIONS["lossless"]]
    with tempfile.TemporaryDirectory(prefix="fluxrun-lost-") as name:
        folder = Path(name) / "run"
        words = [*model, "memory=staged", "parallel=ulysses", "num_images=500", f"hydra.run.dir={folder}"]
        started = time.monotonic()
        with (Path(name) / "log").open("wb") as log:
            running = subprocess.Popen(
                [sys.executable, "-m", "fluxrun", *words], stdout=log, stderr=log, env=environment(), cwd=name
            )
        while not list(folder.glob("images/*.png")):
            if running.poll() is not None or time.monotonic() - started > START_S + ROW_S:
                kill(running)
                return {"error": "it drew nothing", "log": (Path(name) / "log").read_text(errors="replace")[-3000:]}
            time.sleep(0.1)
        drew_s = time.monotonic() - started
        time.sleep(3)
        beats = Path(tempfile.gettempdir()).glob("fluxrun-ranks-*/rank1.json")
        pid = json.loads(max(beats, key=os.path.getmtime).read_text())["pid"]
        os.kill(pid, number)
        killed = time.monotonic()
        while read_record(folder).status == "running" and time.monotonic() - killed < 90:
            time.sleep(0.05)
        recorded_s = time.monotonic() - killed
        running.wait(60)
        ended_s, record = time.monotonic() - killed, read_record(folder)
        said = (Path(name) / "log").read_text(errors="replace")[-2000:]
        return {
            "first_picture_s": round(drew_s, 2), "recorded_s": round(recorded_s, 2), "ended_s": round(ended_s, 2),
            "status": record.status, "error_message": record.error and record.error.message, "said": said,
            "images": len(record.images), "exit_code": running.returncode, "parallel": record.options["parallel"].facts,
            "memory": record.memory.model_dump(), "steady_step_s": str(record.timings.steady_step_s),
        }  # fmt: skip


def compared(rows: dict[str, Row]) -> dict[str, Any]:
    """How many times faster than one GPU each row is."""
    found = {}
    for name, row in rows.items():
        one = rows.get(name.replace("-no-graph", "").rsplit(" ", 1)[0] + " single", {})
        if "median_ms" in row and "median_ms" in one:
            found[name] = round(one["median_ms"] / row["median_ms"], 3)
    return found


def main() -> None:
    """Measure, from outside or as one of torchrun's processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", type=float, default=400)
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure_all(json.loads(given.measure), given.out, tiny=given.tiny)
        return
    end = time.monotonic() + given.budget
    out: dict[str, Any] = {
        "command": sys.argv, "commit": git_commit(), "gpus": [gpu.name for gpu in detect().gpus],
        "before": gpu_state(), "tiny": given.tiny, "rows": {}, "times_one_gpu": {},
    }  # fmt: skip

    def save() -> None:
        out["times_one_gpu"] = compared(out["rows"])
        write_atomically(given.out, json.dumps(out, indent=1) + "\n")

    def wanted(name: str) -> bool:
        return any(part in name for part in given.only)

    rows = [name for name in names() if wanted(name)]
    lost = wanted("lost") and not given.tiny
    first, rest = (rows[:3], rows[3:]) if lost else (rows, [])
    measure_outside(first, out, save, end, tiny=given.tiny)
    if lost:
        out["lost_process"] = lost_process(tiny=given.tiny)
        save()
    measure_outside(rest, out, save, end, tiny=given.tiny)
    save()
    print(json.dumps({"times_one_gpu": out["times_one_gpu"], "lost": out.get("lost_process")}, indent=1))


if __name__ == "__main__":
    main()
