"""The node's inputs: its own, and one drop-down per option group, made from fluxrun's catalogue."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from fluxrun.config.catalog import Catalog
from fluxrun.config.schema import GROUPS
from fluxrun.hardware.detection import detect
from fluxrun.serving.catalogue import catalogue

Inputs = dict[str, tuple[Any, dict[str, Any]]]

NO_LORA = "[None]"

MOST_PICTURES = 4

IMAGES = tuple(f"image{number}" for number in range(1, MOST_PICTURES + 1))

LARGEST_SEED = 2**53 - 1
"""The page of ComfyUI computes with JavaScript's numbers, which are exact up to here."""

TOOLTIPS = {
    "prompt": "Text description of the image to generate.",
    "steps": "Number of denoising steps. 0: the model's own.",
    "cfg": (
        "Guidance scale: how closely to follow the prompt. 0: the model's own. Distilled models (klein, "
        "shapes) have none and refuse one."
    ),
    "width": "Image width in pixels, a multiple of 16. 0: the model's own.",
    "height": "Image height in pixels, a multiple of 16. 0: the model's own.",
    "seed": "Random seed for reproducible generation. Same seed + settings = same image.",
    "image": "A reference picture: what to edit, or to take a subject from.",
    "lora_selection": "A LoRA from ComfyUI's loras folder. It stands beside the weights, which are not changed.",
    "lora_strength": "LoRA influence strength. 1.0 = full strength, 0.5 = half strength.",
    "memory_mode": (
        "auto = the fastest placement that fits, by an estimate. gpu = all on the GPU (memory=resident). "
        "balanced = text encoder or transformer, whichever is needed (memory=balanced). lowvram = layers "
        "stream to the GPU while they are needed (memory=group)."
    ),
    "use_torch_compile": (
        "Use torch.compile (compile=regional). First run adds compilation, then all runs are faster. Measured "
        "on an H100 with klein 4B: 84 to 58 ms a step, 14 s for the first one. Where it cannot compile it "
        "goes on without."
    ),
    "use_xformers": (
        "Use xFormers memory-efficient attention (attention=xformers). Off, because measured on an H100 it is "
        "11 % slower than torch's own attention, compiled 15-22 %; on Ampere and Ada that has the same "
        "FlashAttention-2 kernel. Requires: pip install xformers. Falls back to SDPA if not available."
    ),
    "enable_vae_tiling": (
        "Enable VAE tiling for very large images (vae=tiled). Prevents out of memory on large resolutions. "
        "vae=auto tiles by itself where the picture or the memory asks for it."
    ),
    "keep_loaded": (
        "Off: after the picture the process that draws ends and gives its memory back, for graphs in which "
        "other models follow. On: it stays warm for ten minutes."
    ),
    "overrides": (
        "Anything else, as on fluxrun's command line, one a line: compile.dynamic=true. A workflow is a "
        "stranger's file: it sets keys that docs/options.md marks open, and names files as input:NAME and "
        "loras:NAME, from ComfyUI's own folders."
    ),
}


@functools.cache
def options() -> dict[str, Any]:
    """Groups with their options: what each is for, and whether this machine can use it. None of it changes."""
    machine = detect()
    names = [name for name in Catalog().names("model") if name != "local"]
    groups: dict[str, Any] = catalogue(machine.on(machine.default_device()), names)["groups"]
    return groups


def models() -> list[str]:
    """The models that fluxrun knows by name; ``local`` stands for any folder."""
    return [str(option["name"]) for option in options()["model"]["options"]]


def default_of(group: str) -> str:
    """The option that a group has where nobody chooses."""
    return str(options()[group]["default"])


def required(checkpoints: Sequence[str]) -> Inputs:
    """What a picture needs; ``checkpoints`` are the names of ComfyUI's own model folders."""
    edge = {"default": 0, "min": 0, "max": 4096, "step": 16}
    seed = {"default": 0, "min": 0, "max": LARGEST_SEED, "control_after_generate": True}
    prompt = {"default": "a red circle left of a blue square", "multiline": True, "dynamicPrompts": True}
    return {
        "prompt": _input("prompt", "STRING", **prompt),
        "model": ([*models(), *checkpoints], {"default": default_of("model"), "tooltip": _about("model")}),
        "steps": _input("steps", "INT", default=0, min=0, max=500),
        "cfg": _input("cfg", "FLOAT", default=0.0, min=0.0, max=30.0, step=0.1),
        "width": _input("width", "INT", **edge),
        "height": _input("height", "INT", **edge),
        "seed": _input("seed", "INT", **seed),
    }


def optional(loras: Sequence[str]) -> Inputs:
    """What has a default that most pictures can do with; ``loras`` are ComfyUI's own LoRA files.

    Settings under the names that a ComfyUI user knows stand for an option of a group below them.
    """
    return {
        **{name: ("IMAGE", {"tooltip": TOOLTIPS["image"]}) for name in IMAGES},
        "lora_selection": _input("lora_selection", [NO_LORA, *loras], default=NO_LORA),
        "lora_strength": _input("lora_strength", "FLOAT", default=1.0, min=-5.0, max=5.0, step=0.05),
        "memory_mode": _input("memory_mode", ["auto", "gpu", "balanced", "lowvram"], default="auto"),
        "use_torch_compile": _input("use_torch_compile", "BOOLEAN", default=False),
        "use_xformers": _input("use_xformers", "BOOLEAN", default=False),
        "enable_vae_tiling": _input("enable_vae_tiling", "BOOLEAN", default=False),
        "keep_loaded": _input("keep_loaded", "BOOLEAN", default=True),
        **{group: _drop_down(group) for group in GROUPS if group != "model"},
        "overrides": _input("overrides", "STRING", default="", multiline=True),
    }


def _input(name: str, kind: Any, **about: Any) -> tuple[Any, dict[str, Any]]:
    return kind, {**about, "tooltip": TOOLTIPS[name]}


def _drop_down(group: str) -> tuple[Any, dict[str, Any]]:
    names = [option["name"] for option in options()[group]["options"]]
    return names, {"default": default_of(group), "tooltip": _about(group)}


def _about(group: str) -> str:
    found = options()[group]
    return "\n".join([f"{group}: {found['about']}", *map(_line, found["options"])])


def _line(option: dict[str, Any]) -> str:
    """An option in a tooltip: what it is for, and why it would not be used here."""
    here = "" if option["usable"] else f" (not on this machine: {option['why_not']})"
    return f"{option['name']}: {option['about']}{here}"
