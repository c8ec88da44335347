"""What is measured through the ordinary ``fluxrun`` command, a process each: first images, and memory budgets."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from speed_settings import MemoryRow, Setting

Row = dict[str, Any]
Save = Callable[[Row], None]
FROM_RECORD = ("status", "error", "options", "notes", "timings", "memory")
HERE = Path(__file__).resolve().parent


def first_images(settings: Sequence[Setting], model: Sequence[str], deadline: float, save: Save, log: Path) -> None:
    """A new process's first image per setting: nothing compiled before (``cold``), and the same again (``warm``)."""
    for setting in settings:
        with tempfile.TemporaryDirectory(prefix="fluxrun-speed-") as folder:
            caches = {"FLUXRUN_CACHE_DIR": f"{folder}/cache", "TRITON_CACHE_DIR": f"{folder}/triton"}
            for state in ("cold", "warm"):
                arguments = [*model, *setting.overrides]
                row = {"setting": setting.name, "state": state, "overrides": arguments}
                command = [sys.executable, "-m", "fluxrun"]
                out = Path(folder) / state
                save(row | run(command, arguments, out, min(120.0, deadline - time.monotonic()), log, caches))


def memory_budgets(
    rows: Sequence[MemoryRow], models: Mapping[str, Sequence[str]], deadline: float, save: Save, log: Path
) -> None:
    """Every model under its limit on the GPU's memory."""
    for row in rows:
        # The second image is the one that counts: the first one also pays for kernels chosen and memory found.
        repeats = () if row.plain else ("measure.repeats=2",)
        arguments = [*models[row.model], f"steps={row.steps}", *repeats, *row.overrides]
        about = {"setting": row.name, "model": row.model, "budget_gb": row.budget_gb, "overrides": arguments}
        script = "speed_offloaded.py" if row.plain else "speed_capped.py"
        command = [sys.executable, str(HERE / script), f"{row.budget_gb:g}"]
        with tempfile.TemporaryDirectory(prefix="fluxrun-speed-") as folder:
            seconds = min(row.seconds, deadline - time.monotonic())
            save(about | {"steps": row.steps} | run(command, arguments, Path(folder) / "run", seconds, log))


def run(
    command: Sequence[str],
    arguments: Sequence[str],
    out: Path,
    seconds: float,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Row:
    """One process, at most ``seconds``; what its record says, or why there is none."""
    if seconds <= 5:
        return {"status": "not measured", "error": "out of time"}
    inherited = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    started = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [*command, *arguments, f"hydra.run.dir={out}"],
            env={**inherited, **(environment or {})},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"status": "not measured", "error": f"not finished within {seconds:.0f} s"}
        finally:
            _end(process)
    row = {"process_s": time.perf_counter() - started, "exit": process.returncode}
    return row | _read(out / "run.json", log)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started (compile workers), if they still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(path: Path, log: Path) -> Row:
    """The parts of run.json that tell speed, memory and what was in effect; ``status`` as the other sections say it."""
    if not path.exists():
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return {"status": "failed", "error": f"no record: {' '.join(last)[:300]}"}
    record = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: record[key] for key in FROM_RECORD}
    if record["status"] == "completed":
        return kept | {"status": "measured", "error": None}
    return kept | {"status": "failed", "error": (record["error"] or {}).get("message")}
