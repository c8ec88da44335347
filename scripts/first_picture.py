"""From Enter to picture: whole processes of this checkout and another, in turns, Triton's cache cold and warm.

    python scripts/first_picture.py --json OUT.json                # +preset=h100_fast, klein-4B, random weights
    python scripts/first_picture.py --json OUT.json --beside base/src --warm 2 --imports
    python scripts/first_picture.py --json OUT.json --warm 1 -- model=tiny height=64 width=64      # a dry run on a CPU

The other checkout is a folder: `mkdir base && git archive 3180511 src conf models | tar x -C base`. Cold: neither
Triton nor fluxrun has kept anything. The file is written after each process. `--imports` traces the imports of one
process more of each checkout (scripts/startup.py), by CPU-seconds and modules.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from startup import grouped, imports_of

RUN = ["+preset=h100_fast", "model=flux2_klein_4b", "model.weights=random"]


def environment(source: Path, caches: Path) -> dict[str, str]:
    """A process that runs this source and keeps what it keeps in ``caches``."""
    return os.environ | {
        "PYTHONPATH": str(source.resolve()),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "FLUXRUN_CACHE_DIR": str(caches / "cache"),
    }


def draw(source: Path, caches: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """One process: its seconds from outside, and what its record says."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "fluxrun", *overrides, f"hydra.run.dir={place}/run"]
        started = time.perf_counter()
        done = subprocess.run(
            command, env=environment(source, caches), cwd=place, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - started
        file = Path(place) / "run" / "run.json"
        record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    row = {"exit": done.returncode, "process_s": round(seconds, 2), **of_record(record)}
    return row if done.returncode == 0 else {**row, "stderr": done.stderr[-2000:]}


def of_record(record: dict[str, Any]) -> dict[str, Any]:
    """The parts of a run's record that are about time, what was really used, and the pixels."""
    options = record.get("options", {})
    return {
        "timings": {
            name: record.get("timings", {}).get(name) for name in ("import_s", "load_s", "apply_s", "first_call_s")
        },
        "spans": record.get("spans"),
        "options": {group: option["effective"] for group, option in options.items()},
        "fallbacks": {group: option["fallbacks"] for group, option in options.items() if option["fallbacks"]},
        "notes": record.get("notes"),
        "pictures": [image["sha256"] for image in record.get("images", [])],
    }


def rows(sources: Sequence[Path], overrides: Sequence[str], warm: int) -> Iterator[dict[str, Any]]:
    """Each checkout's processes: cold, then warm ones, in turns, so that what slows the machine down slows both."""
    with tempfile.TemporaryDirectory() as place:
        for state in ("cold", *(f"warm {n + 1}" for n in range(warm))):
            for number, source in enumerate(sources):
                yield {"source": str(source), "state": state, **draw(source, Path(place) / str(number), overrides)}


def traced(source: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """CPU-seconds and modules of one process's imports."""
    with tempfile.TemporaryDirectory() as place:
        own = imports_of(["fluxrun", *overrides], source.resolve(), Path(place), 1)
    seconds = {name: round(spent, 3) for name, spent in grouped(own).most_common(30)}
    return {"source": str(source), "modules": len(own), "imports_cpu_s": round(sum(own.values()), 2), "groups": seconds}


def main() -> None:
    """Measure, print a line each, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=RUN)
    parser.add_argument("--beside", type=Path, action="append", default=[], help="the src folder of another checkout")
    parser.add_argument("--warm", type=int, default=2, help="processes with a warm Triton cache")
    parser.add_argument("--imports", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    sources = [Path(__file__).resolve().parents[1] / "src", *given.beside]
    result: dict[str, Any] = {
        "command": ["python", "scripts/first_picture.py", *sys.argv[1:]],
        "rows": [],
        "imports": [],
    }

    def write() -> None:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for row in rows(sources, given.overrides, given.warm):
        result["rows"].append(row)
        write()
        print(row["source"], row["state"], row["process_s"], "s", row["timings"], "exit", row["exit"], flush=True)
    for source in sources if given.imports else ():
        result["imports"].append(traced(source, given.overrides))
        write()
        print({name: value for name, value in result["imports"][-1].items() if name != "groups"}, flush=True)


if __name__ == "__main__":
    main()
