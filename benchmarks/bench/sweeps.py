"""What the two sweep benchmarks share: their command line, ``fluxrun`` commands timed, the sweeps' own account."""

import argparse
import json
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.command import FLUXRUN, environment
from fluxrun.record.folder import read_record
from fluxrun.report.rows import Result

Found = dict[str, Any]


def main(about: str, result: str, model: str, parts: Mapping[str, Callable[[Path, str], Found]]) -> None:
    """Run the parts asked for, and write what each has found into the file ``result`` at once."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that is written; a new one")
    parser.add_argument("--model", default=model)
    parser.add_argument("--parts", default=",".join(parts), help="only some of them")
    given = parser.parse_args()
    if unknown := set(given.parts.split(",")) - parts.keys():
        parser.error(f"--parts {', '.join(sorted(unknown))}: of {', '.join(parts)}")
    given.out.mkdir(parents=True, exist_ok=True)
    found: Found = {}
    for name in given.parts.split(","):
        found[name] = parts[name](given.out, f"model={given.model}")
        (given.out / result).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def fluxrun(*arguments: str) -> Found:
    """Run one command: the line, wall seconds, exit code. A failed one is said, and the next ones still run."""
    line, started = shlex.join(["fluxrun", *arguments]), time.perf_counter()
    print(f"\n=== {line}", flush=True)
    code = subprocess.run([*FLUXRUN, *arguments], check=False, env=environment()).returncode
    wall = round(time.perf_counter() - started, 2)
    print(f"=== exit code {code} after {wall} s", flush=True)
    return {"command": line, "wall_s": wall, "exit_code": code}


def swept(folder: Path) -> Result:
    """A sweep's own account; an empty one where it left none."""
    path = folder / "sweep.json"
    return Result.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else Result(status="missing")


def statuses(sweep: Result) -> dict[str, int]:
    """How many jobs ended how."""
    return dict(Counter(job.status for job in sweep.jobs))


def totals(sweep: Result) -> Found:
    """Where a sweep's seconds went, by its own account."""
    spent = {key: round(value, 3) for key, value in sweep.totals.model_dump().items()}
    together = round(sweep.totals.load_s + sweep.totals.jobs_s, 3)
    return {**spent, "load_once_plus_jobs_s": together, "jobs": statuses(sweep), "why_loaded": sweep.loads}


def tune(out: Path, model: str, *, flags: tuple[str, ...], overrides: tuple[str, ...]) -> Found:
    """``fluxrun tune``, and a run with the preset that it wrote: what was chosen, and whether it draws as fast."""
    files = ("--output", str(out / "preset" / "tuned.yaml"), "--folder", str(out / "tune"))
    search = fluxrun("tune", model, *files, *flags, *(o for o in overrides if not o.startswith("measure.")))
    use = ("--config-dir", str(out), "+preset=tuned", model, *overrides)
    drawn = fluxrun(*use, f"hydra.run.dir={out / 'tuned'}")
    sweep, record = swept(out / "tune"), read_record(out / "tuned")
    return {
        "as_it_should_be": record.status == "completed",
        "tune": {**search, "seconds": sweep.totals.wall_s, "tried": statuses(sweep)},
        "run": drawn,
        "preset": {group: option.effective for group, option in record.options.items()},
        "fallbacks": [group for group, option in record.options.items() if option.fallbacks],
        "timings": record.timings.model_dump(include={"steady_step_s", "denoise_s", "decode_s"}),
    }
