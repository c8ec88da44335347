"""Times settings at real size through the ordinary ``fluxrun`` command, one process each, into one JSON.

    python benchmarks/real_size.py OUT.json -- common=override … -- name: override … -- name: override …

Example (the figures in docs/performance.md):

    python benchmarks/real_size.py benchmarks/results/klein4b_h100.json \
      -- model=flux2_klein_4b model.weights=random measure.repeats=3 \
      -- eager: -- xformers: attention=xformers -- regional: compile=regional

Weights are random: speed does not depend on them. The raw run.json of every setting is kept in the result.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TIMEOUT_S = 280


def main(arguments: list[str]) -> int:
    """Run every setting and write the result after each one; returns 1 if one of them left no record."""
    out, common, settings = parse(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in settings:
            rows.append(measure(name, [*common, *overrides], Path(folder) / name))
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(
                json.dumps({"command": ["python", "benchmarks/real_size.py", *arguments], "rows": rows}, indent=1)
            )
            print(line(rows[-1]), flush=True)
    return int(any(row["record"] is None for row in rows))


def parse(arguments: list[str]) -> tuple[Path, list[str], list[tuple[str, list[str]]]]:
    """OUT, the common overrides, and (name, overrides) of each setting."""
    parts: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--":
            parts.append([])
        else:
            parts[-1].append(argument)
    (out,), common, *settings = parts
    return Path(out), common, [(words[0].rstrip(":"), words[1:]) for words in settings]


def measure(name: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """One process; its record, or the end of its output where it left none."""
    command = [sys.executable, "-m", "fluxrun", *overrides, f"hydra.run.dir={folder}"]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        code, output = done.returncode, done.stderr[-2000:]
    except subprocess.TimeoutExpired:
        code, output = -1, f"no end within {TIMEOUT_S} s"
    record = folder / "run.json"
    row: dict[str, Any] = {
        "name": name,
        "overrides": overrides,
        "exit": code,
        "process_s": time.perf_counter() - started,
    }
    return {**row, "output": output, "record": json.loads(record.read_text()) if record.exists() else None}


def line(row: dict[str, Any]) -> str:
    """A row for the screen: step time, first call, decode, memory, what was in effect."""
    record = row["record"]
    if record is None or record["status"] != "completed":
        return f"{row['name']}: exit {row['exit']} {row['output'][-300:]}"
    timings = record["timings"]
    steady = timings["steady_step_s"]
    in_effect = " ".join(
        f"{g}={o['effective']}" for g, o in record["options"].items() if o["effective"] != o["requested"]
    )
    return (
        f"{row['name']:24} {steady['median'] * 1e3:8.2f} ms/step [{steady['min'] * 1e3:.2f}-{steady['max'] * 1e3:.2f}] "
        f"first {timings['first_call_s']:.1f} s, decode {min(timings['decode_s']) * 1e3:.0f} ms, "
        f"load {timings['load_s']:.1f} s, peak {record['memory']['peak_allocated_bytes'] / 2**30:.1f} GB, "
        f"process {row['process_s']:.0f} s {in_effect}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
