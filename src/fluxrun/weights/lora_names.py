"""The tensors of a LoRA file, by name: which layers of a FLUX.2 transformer they are for. Nothing is guessed.

Trainers write the same layers under many names: diffusers' own or those of Black Forest Labs' code, with a prefix or
without, in dots or in underscores. All of them are looked up in one table, which is made from the model's own layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fluxrun.formatting import shorten
from fluxrun.options.adapters import Sizes
from fluxrun.reading import Unreadable, parse_json
from fluxrun.weights.headers import Tensor

PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.",
    "lora_unet_", "lora_transformer_", "lycoris_",
)  # fmt: skip
"""What trainers write before a layer's name."""

TEXT_ENCODER = ("text_encoder", "lora_te", "te.", "te1.", "te2.", "clip_l.", "t5xxl.")

PARTS = re.compile(
    r"(?P<layer>.+)\.(?:(?P<down>lora_A|lora_down|lora\.down|lora_linear_layer\.down)"
    r"|(?P<up>lora_B|lora_up|lora\.up|lora_linear_layer\.up))(?:\.default)?\.weight"
    r"|(?P<scaled>.+)\.alpha"
)

DORA = re.compile(r"\.(dora_scale|lora_magnitude_vector(\.default)?(\.weight)?)$")

OTHER_KINDS = {".lokr_": "LoKr", ".hada_": "LoHa", ".oft_": "OFT", ".glora_": "GLoRA"}

BLOCK = r"transformer_blocks\.(\d+)\."
OF_BLACK_FOREST_LABS = {
    BLOCK + r"attn\.to_[qkv]": r"double_blocks.\1.img_attn.qkv",
    BLOCK + r"attn\.add_[qkv]_proj": r"double_blocks.\1.txt_attn.qkv",
    BLOCK + r"attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
    BLOCK + r"attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
    BLOCK + r"ff\.linear_in": r"double_blocks.\1.img_mlp.0",
    BLOCK + r"ff\.linear_out": r"double_blocks.\1.img_mlp.2",
    BLOCK + r"ff_context\.linear_in": r"double_blocks.\1.txt_mlp.0",
    BLOCK + r"ff_context\.linear_out": r"double_blocks.\1.txt_mlp.2",
    "single_" + BLOCK + r"attn\.to_qkv_mlp_proj": r"single_blocks.\1.linear1",
    "single_" + BLOCK + r"attn\.to_out": r"single_blocks.\1.linear2",
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    r"time_guidance_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
    r"time_guidance_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
    r"time_guidance_embed\.guidance_embedder\.linear_1": "guidance_in.in_layer",
    r"time_guidance_embed\.guidance_embedder\.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
    r"norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"(single_stream_modulation|double_stream_modulation_img|double_stream_modulation_txt)\.linear": r"\1.lin",
}
"""A layer's name in diffusers (a pattern), and in Black Forest Labs' code, where query, key and value are one layer."""

SHIFT_FIRST = "final_layer.adaLN_modulation.1"
"""Black Forest Labs' last modulation puts the shift before the scale, diffusers' the scale before the shift."""


@dataclass(frozen=True)
class Parts:
    """The names of a layer's tensors in a file."""

    down: str | None = None
    up: str | None = None
    alpha: str | None = None


@dataclass
class Sorted:
    """A file's tensors by layer, as the file calls it."""

    layers: dict[str, Parts]
    dora: list[str] = field(default_factory=list)
    text_encoder: list[str] = field(default_factory=list)

    @property
    def dropped(self) -> list[str]:
        """What is not drawn, in words."""
        texts = []
        if self.dora:
            texts.append(f"it is a DoRA: {_some(self.dora)} dropped, it is drawn as a LoRA without them")
        if self.text_encoder:
            texts.append(f"{_some(self.text_encoder)} dropped: only the transformer's layers are adapted")
        return texts


class Match(NamedTuple):
    """One layer of the transformer, and what of the file is added to it."""

    layer: str
    parts: Parts
    part: int = 0
    """Which of ``of`` equal parts of the outputs (query, key and value in one)."""
    of: int = 1
    swapped_halves: bool = False
    """Whether the two halves of the outputs change places."""


def sort_tensors(tensors: Mapping[str, Tensor]) -> Sorted:
    """Sort a file's tensors. Raises Unreadable for what is no LoRA, or one that is not whole."""
    found, unknown = Sorted({}), []
    for name in tensors:
        for mark, kind in OTHER_KINDS.items():
            if mark in name:
                raise Unreadable(f"is a {kind} ({shorten(name)}), not a LoRA: only LoRA files are applied")
        if _is_text_encoder(name):
            found.text_encoder.append(name)
        elif DORA.search(name):
            found.dora.append(name)
        elif match := PARTS.fullmatch(name):
            kind = "alpha" if match["scaled"] else "down" if match["down"] else "up"
            layer = match["scaled"] or match["layer"]
            found.layers[layer] = replace(found.layers.get(layer, Parts()), **{kind: name})
        else:
            unknown.append(name)
    if unknown:
        raise Unreadable(f"holds what is no part of a LoRA: {_some(unknown)}")
    if not found.layers:
        raise Unreadable("holds no LoRA for the transformer" + (": it is all for text encoders" if tensors else ""))
    for layer, parts in found.layers.items():
        _check_parts(layer, parts, tensors)
    return found


def _check_parts(layer: str, parts: Parts, tensors: Mapping[str, Tensor]) -> None:
    if parts.down is None or parts.up is None:
        raise Unreadable(f"is not whole: {shorten(layer)} has only one of its two matrices")
    down, up = tensors[parts.down].shape, tensors[parts.up].shape
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
        raise Unreadable(f"cannot be applied: {shorten(layer)} has matrices of {down} and {up}, which do not fit")
    if parts.alpha is not None and tensors[parts.alpha].shape not in ((), (1,)):
        raise Unreadable(f"cannot be applied: {shorten(parts.alpha)} is no single number")


def match_layers(found: Sorted, tensors: Mapping[str, Tensor], model: Mapping[str, Sizes]) -> list[Match]:
    """The transformer's layers that a file is for. Raises Unreadable unless every layer that it names is there."""
    table = layer_names(model)
    matches: list[Match] = []
    missing = []
    for name, parts in found.layers.items():
        known = without_prefix(name)
        layers = table.get(known, [])
        if not layers:
            missing.append(name)
        swapped = known in (SHIFT_FIRST, _flat(SHIFT_FIRST))
        matches += [Match(layer, parts, n, len(layers), swapped) for n, layer in enumerate(layers)]
    if missing:
        count = f"all {len(missing)}" if not matches else f"{len(missing)} of {len(found.layers)}"
        raise Unreadable(f"is not for this model, which lacks {count} layers that it names: {_some(missing)}")
    for match in matches:
        _check_sizes(match, tensors, model[match.layer])
    if len({match.layer for match in matches}) < len(matches):
        raise Unreadable("names the same layer of the transformer twice")
    return matches


def _check_sizes(match: Match, tensors: Mapping[str, Tensor], sizes: Sizes) -> None:
    down, up = tensors[match.parts.down or ""].shape, tensors[match.parts.up or ""].shape
    inputs, outputs = sizes
    if (down[1], up[0]) != (inputs, outputs * match.of):
        raise Unreadable(
            f"is not for this model: {match.layer} has {inputs} inputs and {outputs * match.of} outputs, "
            f"the file's has {down[1]} and {up[0]}"
        )


def layer_names(layers: Iterable[str]) -> dict[str, list[str]]:
    """Every name by which files call the layers of a transformer, and the layers meant: of a joint one all three."""
    table: dict[str, list[str]] = {}
    for layer in layers:
        names = [layer]
        for pattern, name in OF_BLACK_FOREST_LABS.items():
            if match := re.fullmatch(pattern, layer):
                names.append(match.expand(name))
        if layer.startswith("transformer_blocks."):
            names.append(layer.removeprefix("tran"))  # some exports lost these letters with a prefix
        for name in {*names, *map(_flat, names)}:
            table.setdefault(name, []).append(layer)
    return table


def without_prefix(name: str) -> str:
    """A layer's name without what trainers write before it."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def alpha_by_peft(metadata: Mapping[str, Any], layer: str, rank: int) -> float | None:
    """What peft's config says the factor of a layer is; None where it says nothing. Raises Unreadable."""
    if metadata.get("lora_alpha") is None:
        return None
    alpha = _pattern(metadata.get("alpha_pattern"), layer, metadata["lora_alpha"])
    if not isinstance(alpha, int | float):
        raise Unreadable(f"has a lora_alpha that is no number: {shorten(alpha)}")
    return alpha / (rank**0.5 if metadata.get("use_rslora") else rank)


def peft_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The LoraConfig that diffusers keeps in a file's metadata, for the transformer; empty without one."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    config = parse_json(text)
    if not isinstance(config, dict):
        raise Unreadable(f"has metadata that is no mapping: {shorten(json.dumps(config))}")
    return {key.removeprefix("transformer."): value for key, value in config.items()}


def _pattern(patterns: Any, layer: str, default: Any) -> Any:
    """The value of the layer's own entry: peft's are patterns, here they are taken as names or their ends."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        name = str(pattern).removeprefix("^").removesuffix("$").replace("\\.", ".")
        if layer == name or layer.endswith(f".{name}"):
            return value
    return default


def _is_text_encoder(name: str) -> bool:
    return without_prefix(name).startswith(TEXT_ENCODER) or name.startswith(TEXT_ENCODER)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shorten(name, 80) for name in names[:3]) + more
