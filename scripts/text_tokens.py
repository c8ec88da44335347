"""What fewer text tokens do to a picture (``model.max_sequence_length``), on the bundled model.

    python scripts/text_tokens.py benchmarks/results/text_tokens_shapes.json docs/images/text_tokens.png

Held-out prompts are drawn with the model's own 64 tokens and with fewer; each picture is compared with the one of 64,
and judged by what the prompt asks for. These prompts have 21 to 41 tokens, chat template included: with fewer they are
cut off. Writes the figures and a sheet, a row a prompt and a column a length.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

import fluxrun
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.record.schema import RunRecord
from fluxrun.report.fidelity import distance
from fluxrun.shapes import evaluate

LENGTHS = (64, 48, 32, 24, 16)
PER_SET = 8
SHOWN = 4
"""Prompts on the sheet."""


def drawn(length: int, prompts: Path, folder: Path, pool: SessionPool) -> tuple[list[Path], RunRecord]:
    """All prompts with so many text tokens."""
    config = fluxrun.compose([f"model.max_sequence_length={length}", f"prompts_file={prompts}", "seed=0"])
    record = fluxrun.run(config, folder, pool=pool)
    return [folder / image.path for image in record.images], record


def row(length: int, files: list[Path], own: list[Path], cases: list[evaluate.Case]) -> dict[str, Any]:
    """Fidelity to the pictures of the model's own length, and the share of prompts that are drawn as told."""
    found = [distance(one, other) for one, other in zip(files, own, strict=True)]
    psnr = [min(one.psnr_db, 100.0) for one in found if one is not None]
    judged = evaluate.judge(cases, [Image.open(file).convert("RGB") for file in files], [0] * len(files))
    told = [accuracy["all"] * accuracy["images"] for accuracy in judged["accuracy"].values()]
    return {
        "max_sequence_length": length,
        "psnr_min_db": round(min(psnr), 2),
        "psnr_mean_db": round(statistics.mean(psnr), 2),
        "drawn_as_told": round(sum(told)),
        "pictures": len(files),
    }


def main(output: Path, sheet: Path) -> None:
    """Draw, compare, judge; write both files."""
    cases = [case for name in evaluate.SETS for case in evaluate.prompts(name, PER_SET)]
    with tempfile.TemporaryDirectory() as name, SessionPool() as pool:
        folder = Path(name)
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(case.prompt for case in cases) + "\n", encoding="utf-8")
        by_length, rows = {}, []
        for length in LENGTHS:
            by_length[length], record = drawn(length, prompts, folder / str(length), pool)
            rows.append(row(length, by_length[length], by_length[LENGTHS[0]], cases))
            print(rows[-1], flush=True)
        chosen = range(0, len(cases), len(cases) // SHOWN)
        places = [(number, length) for number in list(chosen)[:SHOWN] for length in LENGTHS]
        images = [Image.open(by_length[length][number]).convert("RGB") for number, length in places]
        labels = [f"{length}: {cases[number].prompt}" for number, length in places]
        evaluate.contact_sheet(images, labels, columns=len(LENGTHS)).save(sheet)
        result = {
            "command": f"python scripts/text_tokens.py {output.name} {sheet.name}",
            "prompts": [case.prompt for case in cases],
            "environment": record.environment,
            "rows": rows,
        }
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
