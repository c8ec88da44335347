"""``fluxrun eval``: how often the bundled model draws what it is told, under any list of overrides."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxrun.atomic import write_atomically
from fluxrun.cli.arguments import one_line_parser
from fluxrun.cli.rerun import output_dir
from fluxrun.config.composition import compose
from fluxrun.errors import ConfigError
from fluxrun.process.console import log_to
from fluxrun.record.claiming import claimed
from fluxrun.record.schema import RunRecord
from fluxrun.runner import run

log = logging.getLogger("fluxrun.eval")

SHEET_IMAGES = 24


def command(arguments: Sequence[str]) -> int:
    """``fluxrun eval [--per-set N] [--seeds 0,1,2] [overrides]``: held-out prompts → images → accuracy.

    Writes ``accuracy.json`` and ``contact_sheet.png`` into the run folder and prints accuracy by attribute. The checker
    looks at pixels only and knows nothing of the model; any override (a step cache, fp8, …) can be judged.
    """
    from fluxrun.shapes import evaluate as harness

    options, overrides = _parse(arguments)
    own = [o for o in overrides if not o.startswith("hydra.run.dir=")]
    folder = output_dir([o for o in overrides if o.startswith("hydra.run.dir=")])
    config = compose(own)  # refused before anything is written
    with claimed(folder):
        log_to(folder)
        cases = [case for name in harness.SETS for case in harness.prompts(name, options.per_set)]
        asked = [(case, seed) for seed in options.seeds for case in cases]
        lines = [json.dumps({"prompt": case.prompt, "seed": seed}) for case, seed in asked]
        prompts = folder / "held_out.jsonl"
        prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        # Only what to draw is replaced: the composed options stay exactly as they were asked for.
        source = {**config.source, "prompts_file": str(prompts), "num_images": 1}
        config = type(config).from_dict(source, config.config_dirs)
        record = run(config, folder, command=["fluxrun", "eval", *arguments])
    report = _judge(record, folder, asked)
    write_atomically(folder / "accuracy.json", json.dumps({"overrides": own, **report}, indent=1))
    for name, accuracy in report["accuracy"].items():
        log.info("%s: %s", name, ", ".join(f"{key} {value:.1%}" for key, value in accuracy.items() if key != "images"))
    log.info("accuracy.json and contact_sheet.png are in %s", folder)
    return 0


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = one_line_parser("eval", command.__doc__)
    parser.add_argument("--per-set", type=int, default=120, help="held-out prompts of each kind (single, pair, …)")
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], help="comma-separated seeds")
    options, overrides = parser.parse_known_args(list(arguments))
    if flags := [o for o in overrides if o.startswith("-")]:
        raise ConfigError(
            f"fluxrun eval: unknown flag {flags[0]!r}; allowed: --per-set N, --seeds 0,1,2, and overrides"
        )
    return options, overrides


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _judge(record: RunRecord, folder: Path, asked: Sequence[Any]) -> dict[str, Any]:
    from PIL import Image

    from fluxrun.shapes import evaluate as harness

    images = [Image.open(folder / image.path).convert("RGB") for image in record.images]
    report = harness.judge([case for case, _ in asked], images, [seed for _, seed in asked])
    every = max(1, len(images) // SHEET_IMAGES)
    chosen = range(0, len(images), every)
    sheet = harness.contact_sheet([images[i] for i in chosen], [asked[i][0].prompt for i in chosen])
    sheet.save(folder / "contact_sheet.png")
    return report
