"""``fluxrun`` commands in processes of their own, and what their records say."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from bench.results import Row
from fluxrun.record.folder import read_record

FLUXRUN = (sys.executable, "-m", "fluxrun")


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """A process's environment: modules from where they come from here, and its own place for compiled code."""
    inherited = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(more or {})}


def run(command: Sequence[str], out: Path, seconds: float, log: Path, more: Mapping[str, str] | None = None) -> Row:
    """One process that draws into ``out``, at most ``seconds``: what its record says, or why there is none."""
    if seconds <= 5:
        return {"status": "not measured", "error": "out of time"}
    line, started = [*command, f"hydra.run.dir={out}"], time.perf_counter()
    with open(log, "ab") as output:
        process = subprocess.Popen(line, env=environment(more), stdout=output, stderr=output, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"status": "not measured", "error": f"not finished within {seconds:.0f} s"}
        finally:
            with suppress(ProcessLookupError):  # it, and the compile workers it started, if they still run
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"process_s": time.perf_counter() - started, "exit": process.returncode} | _recorded(out, log)


def _recorded(out: Path, log: Path) -> Row:
    """The parts of run.json that tell speed, memory and what was in effect; ``status`` as the other sections say it."""
    if not (out / "run.json").exists():
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return {"status": "failed", "error": f"no record: {' '.join(last)[:300]}"}
    record = read_record(out)
    kept = record.model_dump(mode="json", include={"options", "notes", "timings", "memory"})
    status = "measured" if record.status == "completed" else "failed"
    return kept | {"status": status, "error": record.error and record.error.message}
