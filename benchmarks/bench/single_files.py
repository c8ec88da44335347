"""Writes a checkpoint's transformer as other programs keep it: one file under Black Forest Labs' own names.

There is no real file of this kind for the bundled model; these make the options that read them measurable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

NAMES = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}  # fmt: skip

IN_DOUBLE = {
    "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2", "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm", "attn.to_add_out": "txt_attn.proj",
    "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
}  # fmt: skip

IN_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2", "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}  # fmt: skip

JOINED = {"img_attn": ("to_q", "to_k", "to_v"), "txt_attn": ("add_q_proj", "add_k_proj", "add_v_proj")}


def original_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' tensors of a FLUX.2 transformer under the names, and in the layout, that they were published in."""
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        path, _, kind = name.rpartition(".")
        if match := re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", path):
            single, number, inner = match.groups()
            if not single and inner.startswith("attn.") and inner[5:] in sum(JOINED.values(), ()):
                continue
            new = f"{'single' if single else 'double'}_blocks.{number}.{(IN_SINGLE if single else IN_DOUBLE)[inner]}"
            found[f"{new}.{'scale' if new.endswith('_norm') else kind}"] = weight
        elif path == "norm_out.linear":
            scale, shift = weight.chunk(2)
            found[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        else:
            found[f"{NAMES[path]}.{kind}"] = weight
    for name in weights:
        if match := re.fullmatch(r"transformer_blocks\.(\d+)\.attn\.to_q\.weight", name):
            for stream, parts in JOINED.items():
                parts_of = [weights[f"transformer_blocks.{match[1]}.attn.{part}.weight"] for part in parts]
                found[f"double_blocks.{match[1]}.{stream}.qkv.weight"] = torch.cat(parts_of)
    return found


def transformer_weights(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint folder's transformer, under its original names."""
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    for file in sorted((folder / "transformer").glob("*.safetensors")):
        weights |= load_file(file)
    return original_names({name: weight.float() for name, weight in weights.items()})


def _in_block(name: str, weight: torch.Tensor) -> bool:
    return "_blocks." in name and weight.ndim == 2


def write_gguf(folder: Path, file: Path, format: str) -> Path:
    """The transformer of a folder as a .gguf file whose blocks are in ``format`` (``Q8_0``, ``Q5_1``, ``Q4_0``)."""
    import gguf

    kind = gguf.GGMLQuantizationType[format]
    writer = gguf.GGUFWriter(file, arch="flux")
    for name, weight in transformer_weights(folder).items():
        values = weight.numpy()
        if _in_block(name, weight):
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_bfl_fp8(folder: Path, file: Path) -> Path:
    """The transformer of a folder as Black Forest Labs publish it in float8: a scale for each row of a matrix."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, weight in transformer_weights(folder).items():
        if not _in_block(name, weight):
            tensors[name] = weight.contiguous()
            continue
        scale = (weight.abs().amax(dim=1) / torch.finfo(torch.float8_e4m3fn).max).clamp(min=1e-12)
        tensors[name] = (weight / scale[:, None]).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, file, metadata={"format": "pt"})
    return file
