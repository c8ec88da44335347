"""Plain diffusers, as a user without fluxrun has it: the pipeline's own classes, and the published recipes on top.

Only the numbers in the weights come from fluxrun (``random_source``), so that both sides compute the same thing.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from torch import nn

from fluxrun.planning.plan import Plan
from fluxrun.weights.random_weights import random_source


def plain_pipeline(plan: Plan, device: str, *, text_encoder: bool) -> Any:
    """A diffusers pipeline of the plan's architecture and dtype with random weights on ``device``."""
    model, make = plan.model, random_source(plan.model, plan.dtype, device, None)
    parts = {name: make(name) if text_encoder else None for name in ("text_encoder", "tokenizer")}
    parts |= {name: make(name) for name in ("transformer", "vae", "scheduler")}
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    klein = {} if model.pipeline == "dev" else {"is_distilled": bool(model.distilled)}
    pipeline: Any = (Flux2KleinPipeline if klein else Flux2Pipeline)(**parts, **klein)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def regional(pipeline: Any) -> None:
    """diffusers' own recommendation: the repeated blocks compiled."""
    pipeline.transformer.compile_repeated_blocks(fullgraph=True)


def flux_fast(pipeline: Any) -> None:
    """huggingface/flux-fast translated to FLUX.2: fused QKV, channels-last, its inductor flags, compiled VAE decoder.

    Left out: max-autotune and coordinate descent, which take minutes for these shapes (cuBLAS won every large
    matmul), and FlashAttention-3 (torch picks cuDNN's attention, as fast). fp8 is ``flux_fast_fp8``.
    """
    import torch._inductor.config as inductor

    inductor.conv_1x1_as_mm = True
    inductor.epilogue_fusion = False
    with torch.no_grad():
        pipeline.transformer.fuse_qkv_projections()
    pipeline.transformer.to(memory_format=torch.channels_last)
    regional(pipeline)
    vae_compiled(pipeline)


def flux_fast_fp8(pipeline: Any) -> None:
    """The same with torchao's dynamic float8 in the blocks, without its own inductor settings, which take minutes."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    def in_block(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "transformer_blocks" in name

    with torch.no_grad():
        pipeline.transformer.fuse_qkv_projections()
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(pipeline.transformer, config, filter_fn=in_block)
    flux_fast(pipeline)


def vae_compiled(pipeline: Any) -> None:
    """VAE weights channels-last, its decoder compiled."""
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.vae.decoder.compile(fullgraph=True)


def cache_dit(pipeline: Any) -> None:
    """cache-dit without a cache (on four steps there is nothing to skip): its compile settings, blocks compiled.

    ``descent_tuning`` is off: it is the coordinate descent that takes minutes.
    """
    import cache_dit as library

    library.set_compile_configs(descent_tuning=False)
    regional(pipeline)


RECIPES: dict[str, Callable[[Any], None]] = {
    "eager": lambda pipeline: None,  # what ``from_pretrained(...).to("cuda")`` gives
    **{recipe.__name__: recipe for recipe in (regional, flux_fast, flux_fast_fp8, vae_compiled, cache_dit)},
}
