"""``fluxrun quantize``: a model in, a quantized diffusers folder out, and how faithful its pictures are."""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxrun.atomic import write_atomically
from fluxrun.cli.arguments import one_line_parser
from fluxrun.cli.rerun import output_dir
from fluxrun.config.catalog import Catalog, neutral_options
from fluxrun.config.composition import compose
from fluxrun.config.schema import RunConfig
from fluxrun.errors import ConfigError, FluxrunError, OptionUnavailable, one_line
from fluxrun.formatting import decibels, gigabytes, seconds
from fluxrun.options.base import Facts
from fluxrun.planning.prepare import Prepared, prepare
from fluxrun.process.console import log_to
from fluxrun.record.claiming import claimed
from fluxrun.record.schema import RunRecord
from fluxrun.report.fidelity import distance, missing
from fluxrun.runner import run
from fluxrun.types import JsonObject
from fluxrun.version import __version__

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("fluxrun.quantize")

LIBRARIES = ("torch", "diffusers", "transformers", "sdnq")

RECORD = "fluxrun_quantization.json"
"""The file in the folder that says how it was made."""


def command(arguments: Sequence[str]) -> int:
    """``fluxrun quantize FOLDER [--no-pictures] [overrides]``: quantize a model and save it as a diffusers folder.

    ``quantization=sdnq`` and its knobs say how; ``quantization.components=[transformer,text_encoder]`` what. Then the
    config's prompts are drawn with the model as it was and as it is read back from FOLDER, into a run folder each.
    FOLDER/fluxrun_quantization.json has layers, bytes and seconds, and how near the pictures are.
    """
    folder, pictures, overrides = _parse(arguments)
    runs = output_dir([o for o in overrides if o.startswith("hydra.run.dir=")])
    config = compose([o for o in overrides if not o.startswith("hydra.run.dir=")])
    prepared = _prepared(config, folder)
    with claimed(runs):
        log_to(runs)
        record = {"command": ["fluxrun", "quantize", *arguments], **_quantized(prepared, folder)}
        _write(folder, record)
        if pictures:
            record["fidelity"] = _fidelity(*_drawn(config, folder, runs))
            _write(folder, record)
    return 0


def _parse(arguments: Sequence[str]) -> tuple[Path, bool, list[str]]:
    parser = one_line_parser("quantize", command.__doc__)
    parser.add_argument("folder", help="the folder to write; it must not be there yet")
    parser.add_argument("--no-pictures", action="store_true", help="do not draw and compare")
    options, overrides = parser.parse_known_args(list(arguments))
    if "=" in options.folder:
        raise ConfigError(f"fluxrun quantize FOLDER [overrides]: name the folder first, got {options.folder!r}")
    if flags := [o for o in overrides if o.startswith("-")]:
        raise ConfigError(f"fluxrun quantize: unknown flag {flags[0]!r}; allowed: --no-pictures, and overrides")
    return Path(os.path.abspath(options.folder)), not options.no_pictures, overrides


def _prepared(config: RunConfig, folder: Path) -> Prepared:
    """The plan, refused where there is nothing to quantize, or a folder in the way. Raises ConfigError."""
    if os.path.lexists(folder):
        raise ConfigError(f"{folder} is already there: name a new folder, nothing is overwritten")
    try:
        prepared = prepare(RunConfig.from_dict({**config.source, "strict": True}, config.config_dirs))
    except OptionUnavailable as error:
        raise ConfigError(str(error).replace(" (strict=true allows no fallback)", "")) from error
    option = prepared.plan.quantization
    if not option.savable:
        options = Catalog(config.config_dirs).loadable("quantization").items()
        names = ", ".join(name for name, other in options if getattr(other, "savable", False))
        raise ConfigError(f"quantization={option.name} makes no folder that diffusers loads; this does: {names}")
    return prepared


def _quantized(prepared: Prepared, folder: Path) -> dict[str, Any]:
    """Load, convert and save; returns the record of it."""
    from fluxrun.process.switches import ProcessState, import_diffusers

    import_diffusers()
    from fluxrun.weights.loading import Conversion, load

    plan, started = prepared.plan, time.perf_counter()
    device, option = plan.machine.device, plan.quantization

    def convert(component: nn.Module, name: str) -> Facts:
        return option.quantize(component, name, "cpu", device)

    log.info("quantizing %s with quantization=%s on %s", prepared.located.source, option.name, device)
    with ProcessState():
        base = load(
            plan.model.model_copy(update={"text_encoder_layers": "all"}),
            dtype=plan.dtype,
            device="cpu",
            conversion=Conversion(convert, device=device),
            progress=lambda text: log.info("%s", text),
            located=prepared.located,
        )
        made = time.perf_counter()
        with _appearing(folder, base.bytes) as temporary:
            base.pipeline.save_pretrained(temporary, variant=None, max_shard_size="5GB")
    saved = time.perf_counter()
    facts = {name: c["quantization"] for name, c in base.facts["components"].items() if "quantization" in c}
    _say_what_was_converted(facts)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    log.info("%s: %s, made in %s, saved in %s", folder, gigabytes(size), seconds(made - started), seconds(saved - made))
    return {
        "fluxrun": __version__,
        "source": prepared.located.source,
        "revision": prepared.located.revision,
        "dtype": plan.dtype,
        "device": device,
        "quantization": option.model_dump(mode="json"),
        "components": facts,
        "bytes": size,
        "quantize_s": made - started,
        "save_s": saved - made,
        "versions": {name: plan.machine.packages.get(name) for name in LIBRARIES},
        "fidelity": None,
    }  # fmt: skip


def _say_what_was_converted(facts: Mapping[str, Facts]) -> None:
    for name, found in facts.items():
        before, after = found["bytes_before"], found["bytes"]
        log.info(
            "%s: %d of %d linear layers (%s), %s -> %s (%.2f)", name, found["converted"], found["of"], found["format"],
            gigabytes(before), gigabytes(after), after / before,
        )  # fmt: skip


@contextmanager
def _appearing(folder: Path, needed: int) -> Iterator[Path]:
    """A folder to write into that takes its name when all of it is there; whatever ends this before removes it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if needed > free:
            raise ConfigError(f"{folder} needs {gigabytes(needed)}, there are {gigabytes(free)} free")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        try:
            yield temporary
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise FluxrunError(f"cannot write {folder}: {error.strerror or one_line(error)}") from error


def _drawn(config: RunConfig, folder: Path, runs: Path) -> tuple[tuple[Path, RunRecord], tuple[Path, RunRecord]]:
    """The config's pictures by the model as it was, and as it is read back from the folder."""
    none = Catalog(config.config_dirs).data("quantization", neutral_options()["quantization"])
    read_back = {**config.source["model"], "weights": "pretrained", "path": str(folder), "id": None, "bundled": None}
    sources = {"original": config.source["model"], "quantized": read_back}
    drawn = []
    for name, model in sources.items():
        source = {**config.source, "model": model, "quantization": none}
        one = RunConfig.from_dict(source, config.config_dirs)
        drawn.append((runs / name, run(one, runs / name, command=sys.argv)))
    return drawn[0], drawn[1]


def _fidelity(original: tuple[Path, RunRecord], quantized: tuple[Path, RunRecord]) -> dict[str, Any] | None:
    """How near each picture is to the same prompt's and seed's of the model as it was; None without scikit-image."""
    if missing():
        return None
    images: list[dict[str, Any]] = []
    for before, after in zip(original[1].images, quantized[1].images, strict=True):
        found = distance(original[0] / before.path, quantized[0] / after.path)
        assert found is not None
        psnr = None if found.psnr_db == float("inf") else found.psnr_db  # JSON has no infinity: equal pictures
        images.append({"prompt": after.prompt, "seed": after.seed, "psnr_db": psnr, "ssim": found.ssim})
    known = [image["psnr_db"] for image in images if image["psnr_db"] is not None]
    lowest, mean = (min(known), statistics.fmean(known)) if known else (None, None)
    log.info("%d picture(s): PSNR at least %s, mean %s", len(images), decibels(lowest), decibels(mean))
    return {
        "runs": [str(original[0].resolve()), str(quantized[0].resolve())],
        "psnr_db_min": lowest, "psnr_db_mean": mean,
        "ssim_mean": statistics.fmean(image["ssim"] for image in images),
        "images": images,
    }  # fmt: skip


def _write(folder: Path, record: JsonObject) -> None:
    write_atomically(folder / RECORD, json.dumps(record, indent=1))
