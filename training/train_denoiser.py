"""Stage 2: text encoder and transformer together, by rectified flow, on the latents of stage 1; saves the pipeline.

python training/train_denoiser.py                      # one GPU, minutes
python training/train_denoiser.py start=models/shapes  # goes on from a saved folder
python training/train_denoiser.py smoke=true           # a CPU, under a minute: checks the machinery
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import hydra
import torch
from common import Average, Clock, autocast, optimizer, rate, setup
from data import make_pool
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from omegaconf import DictConfig, OmegaConf
from render import distance_table, from_rows, render
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

SIDE = 16  # latent tokens per side of a 256-pixel picture


class Denoiser(nn.Module):
    """Text encoder and transformer as the pipeline uses them, from token ids to velocity."""

    def __init__(
        self, text: Qwen3ForCausalLM, transformer: Flux2Transformer2DModel, layers: list[int], length: int
    ) -> None:
        super().__init__()
        self.text, self.transformer, self.layers = text, transformer, layers
        self.pad = text.config.pad_token_id
        zero = torch.zeros(1, dtype=torch.long)
        axis = torch.arange(SIDE)
        self.register_buffer("text_ids", torch.cartesian_prod(zero, zero, zero, torch.arange(length)), persistent=False)
        self.register_buffer("image_ids", torch.cartesian_prod(zero, axis, axis, zero), persistent=False)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Velocity [b, tokens, channels] of noisy latents `x` at `timestep` in [0, 1] for prompts `ids` [b, length]."""
        return self.velocity(x, timestep, self.embeds(ids))

    def embeds(self, ids: torch.Tensor) -> torch.Tensor:
        """The prompts' embeddings [b, length, channels]."""
        mask = (ids != self.pad).long()
        states = self.text.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.cat([states[layer] for layer in self.layers], dim=-1)

    def velocity(self, x: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """The transformer's output for embeddings that are known."""
        return self.transformer(
            hidden_states=x,
            encoder_hidden_states=embeds,
            timestep=timestep,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]


def build(config: DictConfig, tokenizer: Qwen2Tokenizer) -> tuple[Qwen3ForCausalLM, Flux2Transformer2DModel]:
    """Fresh text encoder and transformer; every residual branch of the transformer starts closed."""
    text_config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        **OmegaConf.to_container(config.text_encoder),
    )
    transformer = Flux2Transformer2DModel(
        joint_attention_dim=len(config.out_layers) * config.text_encoder.hidden_size,
        guidance_embeds=False,
        **OmegaConf.to_container(config.transformer),
    )
    modulations = (
        transformer.double_stream_modulation_img,
        transformer.double_stream_modulation_txt,
        transformer.single_stream_modulation,
    )
    for module in (*(m.linear for m in modulations), transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(module.weight)
    return Qwen3ForCausalLM(text_config), transformer


@torch.no_grad()
def encode_pool(vae: AutoencoderKLFlux2, rows: torch.Tensor, device: torch.device, batch: int) -> torch.Tensor:
    """The scenes' normalised latents as the transformer sees them, half precision [n, tokens, channels]."""
    table = distance_table(device)
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    parts = []
    for chunk in rows.split(batch):
        with autocast(device):
            latents = vae.encode(render(from_rows(chunk.to(device)), table)).latent_dist.mode()
        latents = (Flux2KleinPipeline._patchify_latents(latents.float()) - mean) / std
        parts.append(Flux2KleinPipeline._pack_latents(latents).half())
    return torch.cat(parts)


def noise_levels(count: int, shift: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(sigma, what the model is told), both float [count]; spread like the few sigmas that the sampler visits.

    A third of the time the model is told the value that a bfloat16 pipeline would pass, so that it bears its rounding.
    """
    uniform = torch.rand(count, device=device)
    sigma = shift * uniform / (1 + (shift - 1) * uniform)
    sigma = torch.where(torch.rand(count, device=device) < 0.1, torch.rand(count, device=device), sigma)
    rounded = (sigma * 1000).bfloat16().float() / 1000
    return sigma, torch.where(torch.rand(count, device=device) < 0.33, rounded, sigma)


def flow_loss(model: nn.Module, latents: torch.Tensor, ids: torch.Tensor, shift: float) -> torch.Tensor:
    """Mean squared error of the velocity (noise - latents)."""
    noise = torch.randn_like(latents)
    sigma, told = noise_levels(len(latents), shift, latents.device)
    x = torch.lerp(latents, noise, sigma[:, None, None])
    return (model(x, told, ids).float() - (noise - latents)).square().mean()


def train(
    model: Denoiser, latents: torch.Tensor, ids: torch.Tensor, config: DictConfig, device: torch.device, until: float
) -> Denoiser:
    """Train by the clock, at most until the moment `until` (time.monotonic); the averaged model."""
    average, adam = Average(model, config.ema), optimizer([model], config.rate, config.weight_decay)
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs eagerly
    running = torch.compile(model) if config.compile else model
    clock, step, total = Clock(config.seconds), 0, torch.zeros((), device=device)
    while clock.progress < 1:
        pick = torch.randint(len(latents), (config.batch,), device=device)
        words = ids[pick, torch.randint(ids.shape[1], (config.batch,), device=device)].long()
        for group in adam.param_groups:
            group["lr"] = config.rate * rate(clock.progress, step, config.warmup)
        with autocast(device):
            loss = flow_loss(running, latents[pick].float(), words, config.shift)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        average.update(model)
        total += loss.detach()
        step += 1
        if step == 5:  # compiled and warm
            total.item()
            print(f"first steps took {clock.elapsed:.0f} s", flush=True)
            clock.start()
            clock.seconds = max(1.0, min(config.seconds, until - clock.began))
        if step % config.log_every == 0:
            print(f"{clock.elapsed:5.0f} s step {step} loss {total.item() / config.log_every:.4f}", flush=True)
            total.zero_()
    print(f"{step} steps of {config.batch}")
    return average.module


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2, sort_keys=True) + "\n")


def save(model: Denoiser, vae: AutoencoderKLFlux2, tokenizer: Qwen2Tokenizer, folder: Path) -> Flux2KleinPipeline:
    """The pipeline in diffusers' layout, float16 on disk; returned in float32."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    text, transformer = model.text.half().eval(), model.transformer.half().eval()
    pipeline = Flux2KleinPipeline(
        scheduler=scheduler,
        vae=vae.half(),
        text_encoder=text,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=True,
    )
    pipeline.save_pretrained(folder, max_shard_size="14MB")
    edit(
        folder / "text_encoder" / "config.json", dtype="float32"
    )  # so that loading without a dtype fits the other parts
    edit(folder / "model_index.json", tokenizer=["transformers", "Qwen2TokenizerFast"])  # the name FLUX.2 klein has
    return pipeline.to(torch.float32)


@hydra.main(version_base=None, config_path="conf", config_name="denoiser")
def main(config: DictConfig) -> None:
    if config.smoke:
        config = OmegaConf.merge(config, config.smoke_overrides)
    began, device, output = time.monotonic(), setup(config.seed), Path(config.output)
    stage1 = Path(config.stage1)
    tokenizer = Qwen2Tokenizer.from_pretrained(stage1 / "tokenizer")
    vae = AutoencoderKLFlux2.from_pretrained(stage1 / "vae", torch_dtype=torch.float32).to(device)
    rows, ids = make_pool(config.scenes, config.captions, config.length, stage1 / "tokenizer", config.seed)
    print(f"{time.monotonic() - began:.0f} s: {len(rows)} scenes with {ids.shape[1]} captions each", flush=True)
    latents = encode_pool(vae, torch.from_numpy(rows), device, config.encode_batch)
    print(
        f"{time.monotonic() - began:.0f} s: latents {list(latents.shape)}, spread {latents[:1000].float().std():.3f}",
        flush=True,
    )
    if config.start:
        text = Qwen3ForCausalLM.from_pretrained(Path(config.start) / "text_encoder", dtype=torch.float32)
        transformer = Flux2Transformer2DModel.from_pretrained(
            config.start, subfolder="transformer", torch_dtype=torch.float32
        )
    else:
        text, transformer = build(config, tokenizer)
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (text, transformer, vae)]
    print("text encoder {:.2f} M, transformer {:.2f} M, autoencoder {:.2f} M parameters".format(*counts), flush=True)
    model = Denoiser(text, transformer, list(config.out_layers), config.length).to(device)
    averaged = train(model, latents, torch.from_numpy(ids).to(device), config, device, began + config.deadline)
    save(averaged, vae, tokenizer, output)
    print(f"{time.monotonic() - began:.0f} s: saved to {output}")


if __name__ == "__main__":
    main()
