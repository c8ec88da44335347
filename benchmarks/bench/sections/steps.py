"""klein-4B's and dev's denoising steps, and the VAE's decode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.results import Row
from bench.settings import FAST, LOSSLESS, PLAIN, PRESETS, fluxrun, plain
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
    key="step_ms", unit="ms", metric="denoising step", task=steps, overrides=("steps=4",), extensible=True, errs=True,
    groups=(
        (PLAIN, plain("regional"), fluxrun("neutral"), LOSSLESS, FAST, plain("flux_fast")),
        (
            PLAIN,
            fluxrun("cudagraphs", "compile=cudagraphs"),
            fluxrun("fused", "kernels=fused"),
            fluxrun("fused_cudagraphs", "kernels=fused", "compile=cudagraphs"),
            fluxrun("regional_cuda_graph", "compile=regional", "compile.cuda_graph=true"),
            fluxrun("fp8_regional", "quantization=fp8", "compile=regional"),
            fluxrun("fp8_fused_cudagraphs", "quantization=fp8", "kernels=fused", "compile=cudagraphs"),
        ),
        (
            PLAIN,
            fluxrun("regional", "compile=regional"),
            plain("flux_fast_fp8"),
            plain("cache_dit"),
            fluxrun("whole_graph", "compile=default"),
        ),
    ),
)  # fmt: skip

DEV = Timed(
    name="dev", about="dev, one step: one setting at a time, then the same in the opposite order", seconds=190,
    label="dev", model="dev", key="step_ms", scale=1e-3, metric="denoising step", task=steps, overrides=("steps=5",),
    gigabytes=None, rounds=1, extensible=True, errs=True, groups=(PRESETS,),
)  # fmt: skip

_COMPILED = ("compile=regional", "compile.targets=[vae_decoder]", "vae.channels_last=true")

VAE = Timed(
    name="vae", about="VAE decode", label="VAE", seconds=90,
    key="decode_ms", unit="ms", metric="VAE decode 1024x1024", task=decoding,
    groups=(
        (
            *(PLAIN, LOSSLESS, FAST, fluxrun("neutral"), plain("vae_compiled")),
            fluxrun("vae_compile", *_COMPILED),
            fluxrun("vae_compile_cuda_graph", *_COMPILED, "compile.cuda_graph=true"),
        ),
    ),
)  # fmt: skip
