"""From the node's inputs to overrides, the command line's words; what they may ask for is fluxrun's rules' business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxrun.config.schema import GROUPS
from fluxrun.errors import ConfigError
from fluxrun.formatting import nearest, shorten
from fluxrun.serving.client import written
from fluxrun.serving.rules import Accepted

from .inputs import NO_LORA, default_of, optional, required

NUMBERS = {"steps": "steps", "cfg": "guidance", "width": "width", "height": "height"}
"""Inputs in which 0 means the model's own, and their keys."""

SEEDS_OWN = {
    ("use_torch_compile", True): ("compile", "regional"),
    ("use_xformers", True): ("attention", "xformers"),
    ("enable_vae_tiling", True): ("vae", "tiled"),
    ("memory_mode", "gpu"): ("memory", "resident"),
    ("memory_mode", "balanced"): ("memory", "balanced"),
    ("memory_mode", "lowvram"): ("memory", "group"),
}
"""What a setting under the seed's name stands for."""


def check_names(inputs: Mapping[str, Any]) -> None:
    """Refuse inputs that the node does not have: ComfyUI hands on what a workflow has linked, whatever its name."""
    known = [*required(()), *optional(())]
    if strangers := [name for name in inputs if name not in known]:
        raise ConfigError(f"the node has no input {shorten(strangers[0])!r}: {nearest(strangers[0], known)}")


def typed(text: str | None) -> list[str]:
    """The overrides of the text: one a line; empty lines and comments count for nothing."""
    lines = (line.strip() for line in (text or "").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def overrides_of(
    inputs: Mapping[str, Any], *, pictures: Sequence[str], checkpoints: Mapping[str, Path], device: str | None
) -> list[str]:
    """What the inputs ask for. A drop-down comes before a setting under the seed's name, the text before both."""
    asked: dict[str, str] = {"device": device} if device else {}
    asked |= _model(str(inputs["model"]), checkpoints)
    asked |= _groups(inputs)
    asked |= {key: str(inputs[name]) for name, key in NUMBERS.items() if inputs.get(name)}
    if inputs.get("seed") is not None:
        asked["seed"] = str(inputs["seed"])
    if pictures:
        asked["reference_images"] = written(list(pictures))
    lora = inputs.get("lora_selection", NO_LORA)
    if lora != NO_LORA:
        asked["lora"] = "adapters"
        asked["lora.files"] = written([{"path": f"loras:{lora}", "scale": float(inputs.get("lora_strength", 1.0))}])
    more = typed(inputs.get("overrides"))
    set_there = {key_of(line) for line in more}
    words = [f"{key}={value}" for key, value in asked.items() if key not in set_there]
    return [*words, *more, *([] if "prompt" in set_there else [prompt_word(str(inputs["prompt"]))])]


def key_of(override: str) -> str:
    """The key that an override sets."""
    return override.partition("=")[0].lstrip("+")


def prompt_word(text: str) -> str:
    """A prompt as it was typed, also one that the command line would read as a list or as nothing."""
    is_raw = text != "null" and not (text.startswith("[") and text.endswith("]"))
    return f"prompt={text if is_raw else written([text])}"


def overruled(inputs: Mapping[str, Any]) -> list[str]:
    """Lines about settings under the seed's names that a drop-down overrules."""
    return [
        f"{name} is not used: the drop-down says {group}={inputs[group]}"
        for (name, value), (group, option) in SEEDS_OWN.items()
        if inputs.get(name) == value and inputs.get(group, default_of(group)) not in (default_of(group), option)
    ]


def _model(name: str, checkpoints: Mapping[str, Path]) -> dict[str, str]:
    if name not in checkpoints:
        return {"model": name}
    return {"model": "local", "model.path": written(str(checkpoints[name]))}


def _groups(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Options that are not their group's default, which a preset in the text may still choose."""
    by_name = {group: option for (name, value), (group, option) in SEEDS_OWN.items() if inputs.get(name) == value}
    chosen = {g: str(inputs[g]) for g in GROUPS if g != "model" and inputs.get(g, default_of(g)) != default_of(g)}
    return {**by_name, **chosen}


def without_downloads(accepted: Accepted) -> Accepted:
    """The same from what is on this machine: a workflow is not to start a download."""
    model = accepted.data["model"]
    assert isinstance(model, Mapping)
    return replace(accepted, data={**accepted.data, "model": {**model, "offline": True}})
