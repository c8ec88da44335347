"""The names in LoRA files: every dialect finds the same layers, and what cannot be applied is refused by name."""

from __future__ import annotations

import pytest
from loras import QKV, TINY

from fluxrun.reading import Unreadable
from fluxrun.weights.headers import Tensor
from fluxrun.weights.lora_names import (
    alpha_by_peft,
    layer_names,
    match_layers,
    peft_config,
    sort_tensors,
    without_prefix,
)

RANK = 4


def pair(layer, sizes, names=("lora_A", "lora_B"), rank=RANK):
    """A layer's two matrices, as a file's header has them."""
    inputs, outputs = sizes
    down, up = names
    return {
        f"{layer}.{down}.weight": Tensor((rank, inputs), 4 * rank * inputs),
        f"{layer}.{up}.weight": Tensor((outputs, rank), 4 * rank * outputs),
    }


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("transformer.transformer_blocks.0.attn.to_q", QKV[:1]),
        ("transformer_blocks.0.attn.to_q", QKV[:1]),
        ("unet.transformer_blocks.0.attn.to_q", QKV[:1]),
        ("base_model.model.transformer_blocks.0.attn.to_q", QKV[:1]),
        ("base_model.model.transformer.transformer_blocks.0.attn.to_q", QKV[:1]),
        ("diffusion_model.transformer_blocks.0.attn.to_q", QKV[:1]),
        ("diffusion_model.sformer_blocks.0.attn.to_q", QKV[:1]),
        ("lora_transformer_transformer_blocks_0_attn_to_q", QKV[:1]),
        ("diffusion_model.double_blocks.0.img_attn.qkv", QKV),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv", QKV),
        ("double_blocks.0.img_attn.qkv", QKV),
        ("lora_unet_double_blocks_0_img_attn_qkv", QKV),
        ("diffusion_model.double_blocks.0.txt_attn.qkv", [f"transformer_blocks.0.attn.add_{n}_proj" for n in "qkv"]),
        ("diffusion_model.double_blocks.0.img_attn.proj", ["transformer_blocks.0.attn.to_out.0"]),
        ("diffusion_model.double_blocks.0.txt_attn.proj", ["transformer_blocks.0.attn.to_add_out"]),
        ("lora_unet_double_blocks_0_img_mlp_2", ["transformer_blocks.0.ff.linear_out"]),
        ("diffusion_model.single_blocks.1.linear1", ["single_transformer_blocks.1.attn.to_qkv_mlp_proj"]),
        ("lora_unet_single_blocks_1_linear2", ["single_transformer_blocks.1.attn.to_out"]),
        ("diffusion_model.img_in", ["x_embedder"]),
        ("diffusion_model.time_in.in_layer", ["time_guidance_embed.timestep_embedder.linear_1"]),
        ("diffusion_model.double_stream_modulation_img.lin", ["double_stream_modulation_img.linear"]),
        ("diffusion_model.final_layer.linear", ["proj_out"]),
        ("lora_unet_final_layer_adaLN_modulation_1", ["norm_out.linear"]),
    ],
)
def test_every_dialect_finds_the_layers(name, layers):
    assert layer_names(TINY)[without_prefix(name)] == layers
    sizes = (TINY[layers[0]][0], TINY[layers[0]][1] * len(layers))
    tensors = pair(name, sizes, ("lora_down", "lora_up")) | {f"{name}.alpha": Tensor((), 4)}
    matches = match_layers(sort_tensors(tensors), tensors, TINY)
    assert [(match.layer, match.part, match.of) for match in matches] == [
        (layer, part, len(layers)) for part, layer in enumerate(layers)
    ]
    assert {match.parts.alpha for match in matches} == {f"{name}.alpha"}
    assert {match.swapped_halves for match in matches} == {"adaLN" in name}


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"),
                                   ("lora_A.default", "lora_B.default"),
                                   ("lora_linear_layer.down", "lora_linear_layer.up")])  # fmt: skip
def test_every_pair_of_words(names):
    tensors = pair("transformer.proj_out", TINY["proj_out"], names)
    assert list(sort_tensors(tensors).layers) == ["transformer.proj_out"]


def test_dora_and_text_encoder_tensors_are_dropped_and_named():
    tensors = {
        **pair("transformer.proj_out", TINY["proj_out"]),
        **pair("text_encoder.layers.0.q_proj", (8, 8)),
        **pair("lora_te1_layers_0", (8, 8)),
        "transformer.proj_out.dora_scale": Tensor((16, 1), 64),
        "base_model.model.proj_out.lora_magnitude_vector.weight": Tensor((16,), 64),
    }
    found = sort_tensors(tensors)
    assert list(found.layers) == ["transformer.proj_out"]
    dora, text = found.dropped
    assert "DoRA: transformer.proj_out.dora_scale, base_model" in dora
    assert "text_encoder.layers.0.q_proj.lora_A.weight" in text
    assert "and 1 more" in text


LAYER = "transformer.proj_out"
NO_LORA = {
    "none": ({}, "holds no LoRA for the transformer"),
    "text only": (pair("text_encoder.x", (8, 8)), "it is all for text encoders"),
    "weights": ({f"{LAYER}.weight": Tensor((16, 64), 4)}, f"no part of a LoRA: {LAYER}.weight"),
    "LoKr": ({f"{LAYER}.lokr_w1": Tensor((4, 4), 64)}, "is a LoKr"),
    "LoHa": ({f"{LAYER}.hada_w1_a": Tensor((4, 4), 64)}, "is a LoHa"),
    "half": (dict(list(pair(LAYER, (64, 16)).items())[:1]), "only one of its two matrices"),
    "ranks": (
        {f"{LAYER}.lora_A.weight": Tensor((4, 64), 4), f"{LAYER}.lora_B.weight": Tensor((16, 8), 4)},
        "which do not fit",
    ),
    "rank 0": (pair(LAYER, (64, 16), rank=0), "which do not fit"),
    "alpha": (pair(LAYER, (64, 16)) | {f"{LAYER}.alpha": Tensor((4,), 16)}, "is no single number"),
    "alpha alone": ({f"{LAYER}.alpha": Tensor((), 4)}, "only one of its two matrices"),
}


@pytest.mark.parametrize("case", NO_LORA)
def test_what_is_no_lora_is_refused(case):
    tensors, text = NO_LORA[case]
    with pytest.raises(Unreadable, match=text):
        sort_tensors(tensors)


def test_layers_that_are_not_there_are_named():
    known = pair("transformer.proj_out", TINY["proj_out"])
    unknown = {
        k: v for n in range(5) for k, v in pair(f"transformer.transformer_blocks.{n + 7}.attn.to_q", (64, 64)).items()
    }
    with pytest.raises(Unreadable, match=r"lacks 5 of 6 layers .*blocks.7.attn.to_q, .* and 2 more"):
        match_layers(sort_tensors(known | unknown), known | unknown, TINY)
    with pytest.raises(Unreadable, match="lacks all 5 layers"):
        match_layers(sort_tensors(unknown), unknown, TINY)


def test_another_models_sizes_are_refused():
    tensors = pair("transformer.proj_out", (128, 16))
    with pytest.raises(Unreadable, match="proj_out has 64 inputs and 16 outputs, the file's has 128 and 16"):
        match_layers(sort_tensors(tensors), tensors, TINY)


def test_the_same_layer_twice_is_refused():
    tensors = pair("transformer.proj_out", TINY["proj_out"]) | pair("unet.proj_out", TINY["proj_out"])
    with pytest.raises(Unreadable, match="twice"):
        match_layers(sort_tensors(tensors), tensors, TINY)


def test_alpha_from_pefts_config():
    config = peft_config({"lora_adapter_metadata": '{"transformer.lora_alpha": 8, "transformer.alpha_pattern": '
                          '{"^transformer_blocks.0.attn.to_q": 2}, "text_encoder.r": 3}'})  # fmt: skip
    assert alpha_by_peft(config, "proj_out", 4) == 2
    assert alpha_by_peft(config, "transformer_blocks.0.attn.to_q", 4) == 0.5
    assert alpha_by_peft({"lora_alpha": 8, "use_rslora": True}, "proj_out", 4) == 4
    assert alpha_by_peft({}, "proj_out", 4) is None
    assert peft_config({}) == {}


@pytest.mark.parametrize("text", ["[]", "3", "{", '"x"'])
def test_metadata_that_is_no_config_is_refused(text):
    with pytest.raises(Unreadable):
        peft_config({"lora_adapter_metadata": text})


def test_an_alpha_that_is_no_number_is_refused():
    with pytest.raises(Unreadable, match="no number"):
        alpha_by_peft({"lora_alpha": "much"}, "proj_out", 4)
