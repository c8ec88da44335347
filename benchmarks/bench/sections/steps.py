"""klein-4B's and dev's denoising steps, and the VAE's decode."""

from collections.abc import Iterator
from typing import Any

from bench.results import Row
from bench.settings import FAST, LOSSLESS, NEUTRAL, PLAIN, PLAIN_REGIONAL, PRESETS, REGIONAL, Setting
from bench.timed import Timed
from bench.worker import Job


def steps(job: Job) -> Iterator[Row]:
    """Steps of the pipeline's loop, and what the first one is off by."""
    from bench.subject import Subject, free_memory

    subject = Subject(job)
    yield {"build_peak_gb": subject.peak_gb()}
    first_s, _ = subject.timed(lambda: subject.first(subject.step_ms))
    error = subject.error(subject.first_step())
    free_memory()
    yield {"first_call_s": first_s, **error}
    while True:
        subject.step_ms(num_inference_steps=1)  # the turn before was another process's
        yield {"samples": {"step_ms": subject.step_ms()}, **subject.facts()}


def decoding(job: Job) -> Iterator[Row]:
    """Latents to pixels, as the pipeline calls the VAE."""
    import torch

    from bench.subject import Subject, device_seconds

    def decode() -> Any:
        with torch.no_grad():
            return subject.pipeline.vae.decode(latents, return_dict=False)[0]

    subject = Subject(job)
    yield {"build_peak_gb": subject.peak_gb()}
    pipeline, vae = subject.pipeline, subject.pipeline.vae
    shape = (1, vae.config.latent_channels, *(side // pipeline.vae_scale_factor for side in subject.plan.size))
    latents = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0)).to(subject.device, vae.dtype)
    first_s, _ = subject.timed(lambda: subject.first(decode))
    yield {"first_call_s": first_s, **subject.error(subject.first(decode))}  # a CUDA graph is recorded at this call
    while True:
        decode()
        yield {"samples": {"decode_ms": [device_seconds(decode) * 1e3 for _ in range(3)]}, **subject.facts()}


KLEIN = Timed(
    name="klein", about="klein-4B, one step: groups of settings side by side", seconds=150,
    key="step_ms", unit="ms", metric="denoising step", task=steps, overrides=("steps=4",), errs=True,
    groups=(
        (PLAIN, PLAIN_REGIONAL, NEUTRAL, LOSSLESS, FAST, Setting("plain_flux_fast", recipe="flux_fast")),
        (
            PLAIN,
            Setting("cudagraphs", "compile=cudagraphs"),
            Setting("fused", "kernels=fused"),
            Setting("fused_cudagraphs", "kernels=fused compile=cudagraphs"),
            Setting("regional_cuda_graph", "compile=regional compile.cuda_graph=true"),
            Setting("fp8_regional", "quantization=fp8 compile=regional"),
            Setting("fp8_fused_cudagraphs", "quantization=fp8 kernels=fused compile=cudagraphs"),
        ),
        (
            PLAIN,
            REGIONAL,
            Setting("plain_flux_fast_fp8", recipe="flux_fast_fp8"),
            Setting("plain_cache_dit", recipe="cache_dit"),
            Setting("whole_graph", "compile=default"),
        ),
    ),
)  # fmt: skip

DEV = Timed(
    name="dev", about="dev, one step: one setting at a time, then the same in the opposite order", seconds=190,
    label="dev", model="dev", key="step_ms", scale=1e-3, metric="denoising step", task=steps, overrides=("steps=5",),
    gigabytes=None, rounds=1, errs=True, groups=(PRESETS,),
)  # fmt: skip

_COMPILED = "compile=regional compile.targets=[vae_decoder] vae.channels_last=true"
COMPILED = (
    Setting("plain_vae_compiled", recipe="vae_compiled"),
    Setting("vae_compile", _COMPILED),
    Setting("vae_compile_cuda_graph", f"{_COMPILED} compile.cuda_graph=true"),
)

VAE = Timed(
    name="vae", about="VAE decode", label="VAE", seconds=90,
    key="decode_ms", unit="ms", metric="VAE decode 1024x1024", task=decoding,
    groups=((PLAIN, LOSSLESS, FAST, NEUTRAL, *COMPILED),),
)  # fmt: skip
