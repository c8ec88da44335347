"""Every option beside every option of another group: docs/matrix.md, planned for a GPU and really drawn on a CPU.

``python docs/matrix.py`` draws what docs/matrix.json does not have yet (all of it: about half an hour on two cores;
``--again`` forgets what is there, ``--seconds`` stops in between) and writes docs/matrix.md. Pairs that come down to
the same plan are drawn once. A test plans all pairs again, holds them against both files, and draws a few of them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "benchmarks", "tests", "docs")]

from matrix_table import Outcome, Pair, section  # noqa: E402

from fluxrun.config.catalog import Catalog  # noqa: E402
from fluxrun.config.composition import compose  # noqa: E402
from fluxrun.config.schema import GROUPS, RunConfig  # noqa: E402
from fluxrun.errors import FluxrunError  # noqa: E402
from fluxrun.formatting import GIB  # noqa: E402
from fluxrun.hardware.machine import Gpu, Machine, Proof  # noqa: E402
from fluxrun.options.base import Option  # noqa: E402
from fluxrun.options.lora import LoraFile  # noqa: E402
from fluxrun.options.memory import Offload  # noqa: E402
from fluxrun.planning import prepare as preparing  # noqa: E402
from fluxrun.planning.plan import Plan  # noqa: E402
from fluxrun.quantization.declared import Declared  # noqa: E402

JSON_FILE, PAGE = ROOT / "docs" / "matrix.json", ROOT / "docs" / "matrix.md"

SMALL = ("height=64", "width=64", "steps=8", "batch_size=2", "num_images=2", "model.max_sequence_length=32")
"""Small, and with something to do for every option: a batch to slice, steps to skip."""

LIBRARIES = (
    "torchao", "xformers", "flash-attn", "flash-attn-3", "flash-attn-4", "sageattention", "nvidia-cudnn-frontend",
    "cache-dit", "sdnq", "gguf", "bitsandbytes", "torchvision", "kernels", "triton", "peft",
)  # fmt: skip
PACKAGES = {"torch": "2.13.0+cu130", "diffusers": "0.42.1", **dict.fromkeys(LIBRARIES, "99")}

PROVEN = tuple(f"attention={name}" for name in ("cudnn", "flash", "flash3", "flash4", "fp8", "sage", "xformers"))

H100 = Machine(
    gpus=(Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, (9, 0)),),
    driver="580.159", torch_cuda="13.0", cxx_compiler="/usr/bin/g++", packages=PACKAGES, ram_bytes=256 * GIB,
    proven={name: Proof(None, "2026-11-24T00:00:00+00:00") for name in PROVEN}, device="cuda",
)  # fmt: skip
IN_USE = ("torchao", "cache-dit", "sdnq", "gguf", "peft")
CPU = Machine(
    cxx_compiler="/usr/bin/g++", ram_bytes=64 * GIB,
    packages={"torch": "2.13.0+cpu", "diffusers": "0.42.1", **dict.fromkeys(IN_USE, "99")},
)  # fmt: skip
"""What is drawn on: every CPU with these libraries, so that the plans are the same on each."""

MACHINES = {"H100": H100, "CPU": CPU}

NOT_DRAWN = {"name", "fallback", "file", "files"}
"""Knobs that say nothing of what is drawn."""

FILES = {"gguf": "transformer.gguf", "bfl_fp8": "transformer.safetensors"}
"""What stands for the file that an option reads, while it is only planned."""


@functools.cache
def all_pairs() -> tuple[Pair, ...]:
    """Every option of fluxrun's own beside every one of another group; which model is no matter of options."""
    catalog = Catalog()
    groups = [group for group in GROUPS if group != "model"]
    return tuple(
        Pair(a, one, b, other)
        for a, b in itertools.combinations(groups, 2)
        for one in catalog.names(a)
        for other in catalog.names(b)
    )


# --- planned ----------------------------------------------------------------------------------------------------------


@functools.cache
def _base() -> RunConfig:
    return compose(["model=tiny", *SMALL, "memory=resident", "vae=full"])


@functools.cache
def plan_of(pair: Pair, machine: str) -> Plan | str:
    """The plan of a pair, or why it is refused."""
    asked = {pair.group: _option(pair.group, pair.name), pair.other: _option(pair.other, pair.other_name)}
    declared = {"transformer": Declared("sdnq", "int8")} if "quantization=checkpoint" in str(pair) else {}
    try:
        with offloading_to_itself():
            return preparing.make_plan(_base().model_copy(update=asked), MACHINES[machine], declared=declared)
    except FluxrunError as error:
        return str(error)


def planned(pair: Pair, machine: str) -> Outcome:
    """What a plan says of the pair."""
    plan = plan_of(pair, machine)
    if isinstance(plan, str):
        return Outcome("refused", "refused", (plan,))
    reasons = [f.reason for group in (pair.group, pair.other) for f in plan.choices[group].fallbacks]
    return Outcome(plan.choices[pair.group].effective, plan.choices[pair.other].effective, tuple(reasons))


def identity(plan: Plan) -> str:
    """What is drawn: the options in use that are not the neutral ones, with knobs that a conflict has changed."""
    parts = []
    for group, choice in plan.choices.items():
        if group == "model" or choice.effective == _base().options()[group].name:
            continue
        usual = _option(group, choice.effective).model_dump()
        changed = {key: value for key, value in choice.option.model_dump().items() if value != usual[key]}
        knobs = ", ".join(f"{key}={value}" for key, value in changed.items() if key not in NOT_DRAWN)
        parts.append(f"{group}={choice.effective}" + (f"({knobs})" if knobs else ""))
    return " ".join(parts) or "nothing"


@functools.cache
def plans() -> dict[str, Pair]:
    """Every plan that some pair comes down to on a CPU, and the first pair that does."""
    found: dict[str, Pair] = {}
    for pair in all_pairs():
        plan = plan_of(pair, "CPU")
        if isinstance(plan, Plan):
            found.setdefault(identity(plan), pair)
    return found


@functools.cache
def _option(group: str, name: str) -> Option:
    option = Catalog().load(group, name)
    if name == "adapters":
        return option.model_copy(update={"files": (LoraFile(path=Path(__file__)),)})
    return option.model_copy(update={"file": Path(__file__)}) if name in FILES else option


@contextmanager
def offloading_to_itself() -> Iterator[None]:
    """Offloading on a CPU, to the CPU: copies are made, as to a GPU, and everything else is real."""
    with patch.object(Offload, "requires", lambda self, machine: None):
        yield


# --- drawn ------------------------------------------------------------------------------------------------------------


def draw_all(wanted: Iterable[str], known: dict[str, Any], work: Path, seconds: float = float("inf")) -> None:
    """Draw the plans that are not known yet, over weights that are loaded as seldom as can be; written after each."""
    from fluxrun.pipeline.session_pool import SessionPool

    pairs, ends = plans(), time.monotonic() + seconds
    waiting = sorted((name for name in wanted if name not in known), key=_order)
    with _really_drawing():
        for loads, names in itertools.groupby(waiting, key=lambda name: _order(name)[0]):
            with SessionPool() as pool:
                for name in names:
                    if time.monotonic() > ends:
                        return
                    started = time.monotonic()
                    known[name] = drawn(name, pairs[name], work, pool)
                    _write(known)
                    print(f"{time.monotonic() - started:5.1f} s  {name}  {known[name]}  ({loads})", flush=True)


def _order(name: str) -> tuple[str, str]:
    """What compiles comes last, as it takes longest; else what the weights of a plan depend on, and then the rest."""
    parts = sorted(name.split(" "))
    loads = [part for part in parts if part.startswith(("quantization=", "memory=staged"))]
    return ("~ compiled " * ("compile=" in name) + " ".join(loads), " ".join(parts))


@contextmanager
def _really_drawing() -> Iterator[None]:
    import torch
    from accelerate import hooks

    from fluxrun.offload import components

    place = hooks.set_module_tensor_to_device

    def copied(tensor: torch.Tensor, device: object) -> torch.Tensor:
        copy = tensor.detach().clone()
        return torch.nn.Parameter(copy, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else copy

    def placed(module: Any, name: str, device: Any, *given: Any, **more: Any) -> None:
        """A tensor moved to diffusers' "cpu:0" is a copy, and no parameter any more."""
        place(module, name, "cpu" if str(device) == "cpu:0" else device, *given, **more)

    with (
        offloading_to_itself(),
        patch.object(components, "copied", copied),
        patch.object(hooks, "set_module_tensor_to_device", placed),
        patch.object(preparing, "detect", lambda: CPU),
    ):
        yield


def drawn(name: str, pair: Pair, work: Path, pool: Any) -> dict[str, Any]:
    """One small run: what gave way while it was built or drawn; anything that ends it is a crash and is not caught."""
    from fluxrun.runner import run

    overrides = [
        *SMALL, "model=local", f"model.path={checkpoint(pair, work)}", "model.dtype=float32",
        "model.text_encoder_out_layers=[1,2,3]", "memory=resident", "vae=full", *str(pair).split(), *_files(pair, work),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(dir=work) as folder:
        record = run(compose(overrides), Path(folder) / "run", pool=pool)
    plan = plan_of(pair, "CPU")
    assert isinstance(plan, Plan)
    later = {group: [f for f in option.fallbacks if f.stage != "requires"] for group, option in record.options.items()}
    for group, choice in plan.choices.items():
        found = record.options[group]
        chosen_now = group == "model" or choice.option.alternatives  # attention=auto
        if not chosen_now and not any(later.values()) and found.effective != choice.effective:
            raise RuntimeError(f"{name}: {group}={found.effective} was drawn, {choice.effective} was planned")
    return {
        "finite": all(image.finite for image in record.images),
        "fell_back": {
            group: [record.options[group].effective, *(fallback.reason for fallback in fallbacks)]
            for group, fallbacks in later.items()
            if fallbacks
        },
    }


@functools.cache
def _tiny(work: Path) -> Path:
    from fluxrun.weights.loading import save_tiny

    return save_tiny(work / "tiny")


@functools.cache
def _sdnq(work: Path) -> Path:
    from fluxrun.cli.quantize import command

    folder = work / "sdnq"
    command([
        str(folder), "--no-pictures", "model=local", f"model.path={_tiny(work)}", "model.dtype=float32",
        "model.text_encoder_out_layers=[1,2,3]", "quantization=sdnq", f"hydra.run.dir={work / 'quantize'}",
    ])  # fmt: skip
    return folder


def checkpoint(pair: Pair, work: Path) -> Path:
    """The tiny model as a folder; a quantized one for ``quantization=checkpoint``."""
    return _sdnq(work) if "quantization=checkpoint" in str(pair) else _tiny(work)


def _files(pair: Pair, work: Path) -> list[str]:
    """The overrides that name the files which an option reads."""
    found = [f"quantization.file={_single_file(name, work)}" for name in FILES if f"quantization={name}" in str(pair)]
    return found + ([f"lora.files=[{{path: {_lora(work)}}}]"] if "lora=adapters" in str(pair) else [])


@functools.cache
def _single_file(name: str, work: Path) -> Path:
    from bench.single_files import write_bfl_fp8, write_gguf

    file = work / FILES[name]
    return write_gguf(_tiny(work), file, "Q8_0") if name == "gguf" else write_bfl_fp8(_tiny(work), file)


@functools.cache
def _lora(work: Path) -> Path:
    from loras import write_lora

    return write_lora(work / "lora.safetensors")


# --- the page ---------------------------------------------------------------------------------------------------------


def page(known: Mapping[str, Any]) -> str:
    """docs/matrix.md."""
    with_gpu = {pair: planned(pair, "H100") for pair in all_pairs()}
    on_cpu = {pair: outcome(pair, known) for pair in all_pairs()}
    missing = [name for name in plans() if name not in known]
    parts = [
        "# Every option beside every other\n\nGenerated by `python docs/matrix.py`; do not edit. `✓`: both run. Else: "
        "what gives way, and to what; the numbers are the reasons below. An option that a machine cannot use even by "
        "itself has no row.\n",
        "## Planned for an H100 with every library\n",
        *section(with_gpu),
        "\n## Drawn on a CPU\n\nThe tiny model, 64×64, 8 steps, a batch of two, as a checkpoint folder; "
        "`quantization=checkpoint` over one that `fluxrun quantize` made, offloading from the CPU to itself. "
        f"{len(on_cpu)} pairs come down to {len(plans())} plans. {len(known)} of them are drawn: no crash, every "
        f"picture made of numbers. Planned, not drawn yet: {', '.join(f'`{name}`' for name in missing) or 'none'}.\n",
        *section(on_cpu),
    ]
    return "\n".join(parts) + "\n"


def outcome(pair: Pair, known: Mapping[str, Any]) -> Outcome:
    """What was drawn of a pair: as planned, but for what gave way later."""
    plan, found = plan_of(pair, "CPU"), planned(pair, "CPU")
    if isinstance(plan, str) or identity(plan) not in known:
        return found
    later = known[identity(plan)]["fell_back"]
    ways = [later.get(pair.group, [found.effective]), later.get(pair.other, [found.other])]
    reasons = (*found.reasons, *(reason for _, *reasons in ways for reason in reasons))
    return Outcome(ways[0][0], ways[1][0], reasons)


def _write(known: Mapping[str, Any]) -> None:
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(known.items()))
    JSON_FILE.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def read() -> dict[str, Any]:
    """What was drawn, by plan."""
    found: dict[str, Any] = json.loads(JSON_FILE.read_text(encoding="utf-8")) if JSON_FILE.exists() else {}
    return found


def main() -> None:
    """Draw what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="draw every plan again")
    parser.add_argument("--only", default="", help="draw only plans that have this in them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no drawing after that")
    given = parser.parse_args()
    every = plans()
    known = {} if given.again else {name: found for name, found in read().items() if name in every}
    with tempfile.TemporaryDirectory() as folder:
        draw_all([name for name in every if given.only in name], known, Path(folder), given.seconds)
    print(f"{len(known)} of {len(every)} plans are drawn")
    PAGE.write_text(page(known), encoding="utf-8")


if __name__ == "__main__":
    main()
