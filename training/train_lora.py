"""A LoRA for the bundled model: the same scenes, drawn as outlines. The model's weights stay.

python training/train_lora.py     # needs peft; writes models/shapes/loras/outline.safetensors
fluxrun lora=adapters 'lora.files=[{bundled: outline}]'     # once it is there
"""

from __future__ import annotations

import time
from pathlib import Path

import hydra
import torch
from common import rate, setup
from data import make_pool
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from omegaconf import DictConfig
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from train_denoiser import Denoiser, encode_pool, noise_levels

LAYERS = (
    r"single_transformer_blocks\..*\.(to_qkv_mlp_proj|to_out)"
    r"|transformer_blocks\..*\.(to_q|to_k|to_v|to_out\.0|linear_in|linear_out)"
)


@torch.no_grad()
def embed_pool(model: Denoiser, ids: torch.Tensor, batch: int) -> torch.Tensor:
    """Prompt embeddings, half precision [n, length, channels]: the text encoder does not change."""
    device = model.transformer.device
    return torch.cat([model.embeds(chunk.long().to(device)).half() for chunk in ids.flatten(0, 1).split(batch)])


def go_on_from(transformer: Flux2Transformer2DModel, file: str) -> None:
    """Put a file's matrices into the adapter. Raises ValueError where it is of other layers."""
    tensors = {name.removeprefix("transformer."): tensor.float() for name, tensor in load_file(file).items()}
    if tensors.keys() != get_peft_model_state_dict(transformer).keys():
        raise ValueError(f"{file} is of other layers")
    set_peft_model_state_dict(transformer, tensors)


def train(model: Denoiser, latents: torch.Tensor, embeds: torch.Tensor, config: DictConfig) -> None:
    """Train the adapter's matrices."""
    transformer = model.transformer
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=config.rate, betas=(0.9, 0.98), weight_decay=0.0)
    began, total = time.monotonic(), 0.0
    captions, device = len(embeds) // len(latents), latents.device
    for step in range(config.steps):
        pick = torch.randint(len(latents), (config.batch,), device=device)
        words = embeds[pick * captions + torch.randint(captions, (config.batch,), device=device)].float()
        for group in adam.param_groups:
            group["lr"] = config.rate * rate(step / config.steps, step, config.warmup)
        clean = latents[pick].float()
        noise = torch.randn_like(clean)
        sigma, told = noise_levels(len(clean), config.shift, clean.device)
        velocity = model.velocity(torch.lerp(clean, noise, sigma[:, None, None]), told, words)
        loss = (velocity - (noise - clean)).square().mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        total += loss.item()
        if (step + 1) % config.log_every == 0:
            seconds = time.monotonic() - began
            print(f"{seconds:5.0f} s step {step + 1} loss {total / config.log_every:.4f}", flush=True)
            total = 0.0


@hydra.main(version_base=None, config_path="conf", config_name="lora")
def main(config: DictConfig) -> None:
    began, device = time.monotonic(), setup(config.seed)
    torch.set_num_threads(config.threads)
    pipeline = Flux2KleinPipeline.from_pretrained(config.model, torch_dtype=torch.float32)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        part.to(device).requires_grad_(False).eval()
    rows, ids = make_pool(config.scenes, config.captions, config.length, Path(config.model) / "tokenizer", config.seed)
    model = Denoiser(pipeline.text_encoder, pipeline.transformer, list(config.out_layers), config.length).to(device)
    latents = encode_pool(pipeline.vae, torch.from_numpy(rows), device, config.encode_batch, config.stroke)
    embeds = embed_pool(model, torch.from_numpy(ids), config.encode_batch)
    print(f"{time.monotonic() - began:.0f} s: {len(latents)} scenes with {ids.shape[1]} captions each", flush=True)
    adapter = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=LAYERS)
    pipeline.transformer.add_adapter(adapter)
    if config.start is not None:
        go_on_from(pipeline.transformer, config.start)
    train(model, latents, embeds, config)
    tensors = {name: tensor.half().cpu() for name, tensor in get_peft_model_state_dict(pipeline.transformer).items()}
    Flux2KleinPipeline.save_lora_weights(
        config.output, transformer_lora_layers=tensors, weight_name=f"{config.name}.safetensors"
    )
    file = Path(config.output) / f"{config.name}.safetensors"
    print(f"{time.monotonic() - began:.0f} s: {len(tensors) // 2} layers, {file.stat().st_size / 1e6:.2f} MB: {file}")


if __name__ == "__main__":
    main()
