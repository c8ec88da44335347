"""Stage 1: the autoencoder, on scenes drawn while it trains.

python training/train_vae.py                 # one GPU, minutes
python training/train_vae.py smoke=true      # a CPU, seconds: checks the machinery, learns nothing
"""

from __future__ import annotations

import random
from pathlib import Path

import hydra
import torch
from common import Average, Clock, autocast, optimizer, rate, setup
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from render import distance_table, from_rows, random_drawing, render, scene_rows

from fluxrun.shapes.captions import random_scene


def edges(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences between neighbouring pixels, to the right and downwards."""
    return image[..., 1:] - image[..., :-1], image[..., 1:, :] - image[..., :-1, :]


def loss_of(vae: AutoencoderKLFlux2, image: torch.Tensor, config: DictConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, mean absolute error). The decoder sees noisy latents, so that a denoiser's small errors do not show."""
    with torch.set_grad_enabled(not config.decoder_only):
        z = vae.encode(image).latent_dist.mode()
    spread = z.detach().float().std(dim=(0, 2, 3), keepdim=True)
    amount = config.latent_noise * torch.rand(len(z), 1, 1, 1, device=z.device)
    decoded = vae.decode(z + amount * spread * torch.randn_like(z)).sample.float()
    error = decoded - image
    edge = sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(image), strict=True))
    size = z.float().square().mean()  # keeps latents near unit size, as a KL term's mean part does
    loss = error.abs().mean() + 2.0 * error.square().mean() + 0.5 * edge + config.latent_penalty * size
    return loss, error.detach().abs().mean()


@torch.no_grad()
def set_statistics(vae: AutoencoderKLFlux2, images: torch.Tensor) -> None:
    """Store the mean and variance of the patchified latents, by which the pipeline normalises, in `vae.bn`."""
    parts = [vae.encode(chunk).latent_dist.mode().float() for chunk in images.split(32)]
    latents = Flux2KleinPipeline._patchify_latents(torch.cat(parts))
    vae.bn.running_mean.copy_(latents.mean(dim=(0, 2, 3)))
    vae.bn.running_var.copy_(latents.var(dim=(0, 2, 3)))


def scene_pool(count: int, seed: int) -> torch.Tensor:
    """Random scenes from the training side of the split, as rows."""
    rng = random.Random(seed)
    return torch.stack([torch.from_numpy(scene_rows(random_scene(rng))) for _ in range(count)])


def comparison(images: torch.Tensor, decoded: torch.Tensor) -> Image.Image:
    """Originals above, reconstructions below."""
    grid = torch.cat([torch.cat(list(images), dim=-1), torch.cat(list(decoded), dim=-1)], dim=-2)
    return Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


@hydra.main(version_base=None, config_path="conf", config_name="vae")
def main(config: DictConfig) -> None:
    if config.smoke:
        config = OmegaConf.merge(config, config.smoke_overrides)
    device = setup(config.seed)
    table = distance_table(device)
    if config.start:
        vae = AutoencoderKLFlux2.from_pretrained(config.start, subfolder="vae", torch_dtype=torch.float32)
    else:
        vae = AutoencoderKLFlux2(**OmegaConf.to_container(config.model))
    vae = vae.to(device, memory_format=torch.channels_last)
    if config.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    rows = scene_pool(config.pool, 3).to(device)
    print(f"autoencoder: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters on {device}", flush=True)
    average, adam, clock = Average(vae, config.ema), optimizer([vae], config.rate, 0.0), Clock(config.seconds)
    step = 0
    while clock.progress < 1:
        small = clock.progress < config.crop_until  # crops first, then whole pictures
        size, batch = (config.crop, config.crop_batch) if small else (256, config.batch)
        image = render(random_drawing(batch, size, 256, device), table, size=size)
        if not small:  # half of the whole pictures are what the model will draw
            picked = rows[torch.randint(len(rows), (batch // 2,), device=device)]
            image = torch.cat([image[: batch - batch // 2], render(from_rows(picked), table)])
        for group in adam.param_groups:
            group["lr"] = config.rate * rate(clock.progress, step)
        with autocast(device):
            loss, error = loss_of(vae, image.contiguous(memory_format=torch.channels_last), config)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        adam.step()
        average.update(vae)
        if step % config.log_every == 0:
            print(
                f"{clock.elapsed:5.0f} s step {step} loss {loss.item():.4f} error {error.item() * 127.5:.2f}/255",
                flush=True,
            )
        step += 1
    finish(average.module, config, device, table, step)


def finish(vae: AutoencoderKLFlux2, config: DictConfig, device: torch.device, table: torch.Tensor, steps: int) -> None:
    """Statistics, figures, the file."""

    def images_of(count: int, seed: int) -> torch.Tensor:
        return torch.cat([render(from_rows(rows.to(device)), table) for rows in scene_pool(count, seed).split(64)])

    if not config.decoder_only:
        set_statistics(vae, images_of(config.statistics, 1))
    images = images_of(config.checked, 2)
    with torch.no_grad():
        decoded = torch.cat([vae(chunk).sample for chunk in images.split(16)])
    error = (decoded - images).abs() * 127.5
    variance = vae.bn.running_var
    tail = error.flatten()[:4_000_000].sort().values[-4000]
    print(f"{steps} steps; reconstruction error of 255: mean {error.mean():.3f}, 99.9 % below {tail:.1f}")
    print(f"latent variance {variance.min():.4f} to {variance.max():.3f}")
    folder = Path(config.output)
    vae.half().save_pretrained(folder / "vae")
    comparison(images[:8], decoded[:8]).save(folder / "vae_check.png")


if __name__ == "__main__":
    main()
