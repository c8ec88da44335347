"""Which scheduler needs the fewest calls of the transformer for the same picture, on the bundled model.

    python scripts/schedulers.py benchmarks/results/schedulers_shapes.json [key=value …]    # device=cuda batch_size=6

Fidelity (PSNR, dB, over the worst and over all prompts) is to the converged picture, 400 steps of Euler, of the same
prompt and seed: 50 steps would be a point on Euler's own way. In float32 everywhere: bfloat16's rounding of 400 small
steps (the default on a GPU) draws another picture, 28 dB from that of 39 steps. Prints the table of docs/sampling.md.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import fluxrun
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.report.fidelity import distance
from fluxrun.shapes import evaluate

REFERENCE_STEPS = 400
STEPS = (4, 8, 20)
PER_SET = 6
MORE = sys.argv[2:]
"""Overrides for all of them."""
CASES = [
    *(("scheduler=euler", steps) for steps in (*STEPS, 39)),
    *((f"scheduler={name}", steps) for name in ("dpmpp_2m", "unipc") for steps in STEPS),
    *(("scheduler=heun", steps) for steps in (*STEPS, 2, 10)),
    *((f"scheduler={name} scheduler.shift=3", 8) for name in ("euler", "dpmpp_2m", "unipc")),
]
"""Overrides, and the number of steps. Heun makes two calls a step, one in the last: its 10 steps are 19 calls."""


def pictures(overrides: str, steps: int, prompts: Path, folder: Path, pool: SessionPool) -> tuple[list[Path], int, Any]:
    """The pictures of all prompts, the transformer's calls for each, and the record."""
    usual = [f"steps={steps}", f"prompts_file={prompts}", "vae=full", "seed=0", "model.dtype=float32"]
    config = fluxrun.compose([*overrides.split(), *usual, *MORE])
    record = fluxrun.run(config, folder, pool=pool)
    assert not any(option.fallbacks for option in record.options.values()), record.options
    files = [folder / image.path for image in record.images]
    return files, record.options["scheduler"].facts["transformer_calls"], record


def row(overrides: str, steps: int, calls: int, files: list[Path], converged: list[Path]) -> dict[str, Any]:
    """One line of the table: equal pixels count as 100 dB."""
    found = [distance(one, other) for one, other in zip(files, converged, strict=True)]
    psnr = [min(one.psnr_db, 100.0) for one in found if one is not None]
    return {
        "overrides": overrides,
        "steps": steps,
        "transformer_calls": calls,
        "psnr_min_db": round(min(psnr), 2),
        "psnr_mean_db": round(statistics.mean(psnr), 2),
        "ssim_min": round(min(one.ssim for one in found if one is not None), 5),
    }


def main(output: Path) -> None:
    asked = [case.prompt for name in evaluate.SETS for case in evaluate.prompts(name, PER_SET)]
    with tempfile.TemporaryDirectory() as name, SessionPool() as pool:
        folder = Path(name)
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(asked) + "\n")
        converged, _, record = pictures("scheduler=euler", REFERENCE_STEPS, prompts, folder / "converged", pool)
        rows = []
        for number, (overrides, steps) in enumerate(CASES):
            files, calls, _ = pictures(overrides, steps, prompts, folder / str(number), pool)
            rows.append(row(overrides, steps, calls, files, converged))
            print(rows[-1], flush=True)
            result = {
                "what": "fidelity to the converged picture (Euler, 400 steps), model=shapes, 256x256, seed 0",
                "command": " ".join(["python scripts/schedulers.py", output.name, *MORE]),
                "prompts": asked,
                "environment": record.environment,
                "rows": rows,
            }
            output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, by calls."""
    lines = ["| calls | steps | scheduler | PSNR, worst | mean |", "|---|---|---|---|---|"]
    for one in sorted(rows, key=lambda one: (one["transformer_calls"], -one["psnr_mean_db"])):
        name = one["overrides"].removeprefix("scheduler=").replace("scheduler.", "")
        psnr = f"{one['psnr_min_db']:.1f} | {one['psnr_mean_db']:.1f}"
        lines.append(f"| {one['transformer_calls']} | {one['steps']} | {name} | {psnr} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
