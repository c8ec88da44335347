"""Fresh module shells over stored weights: change them freely, the weights stay as they were."""

from __future__ import annotations

import copy
import inspect
from functools import lru_cache
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.image_processor import VaeImageProcessor
from torch import nn

from fluxrun.architectures import PipelineKind
from fluxrun.types import Component, Pipeline
from fluxrun.weights.loading import pipeline_class
from fluxrun.weights.store import Base


def shell(base: Base, kind: PipelineKind | None = None) -> Pipeline:
    """A pipeline of fresh modules over ``base``'s weights: change it freely, the base stays as it was.

    ``kind`` is the pipeline that is drawn with, if not the base's own: one weight store serves all of a family.

    Modules, hooks, attention processors, Parameter objects and buffers are new; parameters share their storage
    with the base (no memory, no time, bit-identical output). Writing into a parameter in place would reach the
    base: whatever must change weights replaces them instead.
    """
    modules = {name: part for name, part in base.pipeline.components.items() if isinstance(part, nn.Module)}
    parts: dict[str, Component] = {
        name: _fresh(part) for name, part in base.pipeline.components.items() if name not in modules
    }
    parts |= {name: _shared_copy(module) for name, module in modules.items()}
    cls: Any = type(base.pipeline) if kind is None else pipeline_class(kind)
    # Settings such as is_distilled: leaving one out silently turns classifier-free guidance on.
    accepted = inspect.signature(cls).parameters
    settings = {k: v for k, v in base.pipeline.config.items() if k in accepted and k not in parts}
    pipeline: Pipeline = cls(**parts, **settings)
    pipeline.set_progress_bar_config(disable=True)
    keep_positions(pipeline)
    if kind == "klein_inpaint":
        mend_overlay(pipeline)
    return pipeline


SIZES_KEPT = 8
"""Of text and of latents: their position ids take 32 bytes a token."""


def keep_positions(pipeline: Pipeline) -> None:
    """Let a pipeline make the position ids of a size once, and keep them where the text or the latents are.

    diffusers makes the same values on the CPU for every picture, and each copy to a GPU waits until the GPU has done
    what it was given before: the text encoder, in whose time the rest of the call can be prepared.
    """
    of_text, of_latents = pipeline._prepare_text_ids, pipeline._prepare_latent_ids

    @lru_cache(SIZES_KEPT)
    def text_ids(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
        return of_text(torch.empty(batch, tokens, 0)).to(device)

    @lru_cache(SIZES_KEPT)
    def latent_ids(batch: int, height: int, width: int, device: torch.device) -> torch.Tensor:
        return of_latents(torch.empty(batch, 0, height, width)).to(device)

    def prepare_text_ids(x: torch.Tensor, t_coord: torch.Tensor | None = None) -> torch.Tensor:
        return text_ids(*x.shape[:2], x.device) if t_coord is None else of_text(x, t_coord)

    def prepare_latent_ids(latents: torch.Tensor) -> torch.Tensor:
        return latent_ids(latents.shape[0], *latents.shape[2:], latents.device)

    pipeline._prepare_text_ids, pipeline._prepare_latent_ids = prepare_text_ids, prepare_latent_ids


def mend_overlay(pipeline: Pipeline) -> None:
    """Let ``padding_mask_crop`` scale what was drawn down to the crop, as diffusers' other inpainting pipelines do.

    The pipeline's own image processor cuts the crop's size out of the middle instead (diffusers 0.42.1).
    """
    pipeline.image_processor.apply_overlay = VaeImageProcessor().apply_overlay


def _shared_copy(module: nn.Module) -> nn.Module:
    """A deep copy whose parameters share storage with the original's; ties and tensor subclasses are kept."""
    memo: dict[int, Any] = {}
    if (parallel := getattr(module, "_parallel_config", None)) is not None:
        memo[id(parallel)] = parallel  # it holds the process groups
    for parameter in module.parameters():
        shared = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        # Some tensor subclasses (bitsandbytes') keep their scales in attributes, which detaching leaves behind.
        vars(shared).update({name: value for name, value in vars(parameter).items() if name not in vars(shared)})
        memo[id(parameter)] = shared
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().clone()
    return copy.deepcopy(module, memo)


def _fresh(part: Component) -> Component:
    """A component without weights, with no state of an earlier run (a scheduler keeps its timesteps)."""
    if isinstance(part, ConfigMixin):
        fresh: Component = type(part).from_config(part.config)
        return fresh
    return copy.deepcopy(part)
