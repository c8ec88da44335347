"""How long the compiler keeps the first image waiting, told before it does. Light: nothing heavy is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fluxrun.options.compile import CompileKnobs
from fluxrun.paths import cache_dir

if TYPE_CHECKING:
    from fluxrun.config import Option
    from fluxrun.machine import Machine

AUTOTUNE = ("max_autotune", "max_autotune_gemm", "max_autotune_pointwise", "coordinate_descent_tuning")
"""Inductor settings that time many kernels for each operation."""


def autotunes(option: Option) -> bool:
    """Whether the option tells the compiler to try many kernels."""
    if not isinstance(option, CompileKnobs) or not option.compiles:
        return False
    asked = any(option.inductor_options.get(name) for name in AUTOTUNE)
    return asked or bool(option.mode and option.mode.startswith("max-autotune"))


def autotune_note(option: CompileKnobs) -> str | None:
    """What is said, before it is paid, about the cost of autotuning."""
    if not autotunes(option):
        return None
    return (
        f"compile={option.name}: expect minutes before the first image: many kernels are timed for every matmul "
        "(H100: dev not done after 200 s, and cuBLAS won every large one; compile=regional takes 4-19 s)"
    )


def expected_wait(option: CompileKnobs, machine: Machine) -> str:
    """The wait with nothing cached, as it was measured (H100 at real size; two CPU cores with model=shapes)."""
    if autotunes(option):
        return "minutes"
    if not machine.accelerated:
        return "about 10-25 s"
    wait = "about 4-19 s" if option.scope == "blocks" else "about 10-40 s"
    return f"{wait}, and 10 s for the decoder" if "vae_decoder" in option.targets else wait


def cache_folder(asked: Path | None) -> Path:
    """Where compiled code is kept between processes: the option's folder, the user's, or fluxrun's own."""
    if asked is not None:
        return asked.expanduser()
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(given) if given else cache_dir() / "inductor"


def holds_anything(folder: Path) -> bool:
    """Whether an earlier process left compiled graphs there."""
    try:
        return next((folder / "fxgraph").iterdir(), None) is not None
    except OSError:
        return False
