"""Types that several packages share: what JSON and YAML hold, and diffusers' FLUX.2 pipelines. Light to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from diffusers.configuration_utils import FrozenDict
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from PIL.Image import Image
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""A value of a JSON or YAML document, to read."""

JsonObject: TypeAlias = "Mapping[str, Json]"
"""The same of a mapping: a config as plain data, a component's config.json, what a picture says of itself."""

Component: TypeAlias = "nn.Module | PreTrainedTokenizerBase | ProcessorMixin | SchedulerMixin | None"
"""A part of a pipeline; None: it was not loaded."""


class Pipeline(Protocol):
    """What fluxrun uses of a ``Flux2Pipeline``, a ``Flux2KleinPipeline`` or one of klein's editing pipelines.

    diffusers gives its pipelines their components at run time, so that a type checker knows nothing of them; here is
    what they are. Methods that fluxrun replaces on a pipeline are written as attributes.
    """

    transformer: Flux2Transformer2DModel
    vae: AutoencoderKLFlux2
    scheduler: Any
    """A FlowMatchEuler, or what a ``scheduler`` option puts in its place."""
    text_encoder: PreTrainedModel | None
    """None while ``memory=staged`` draws: it was freed when every prompt was encoded."""
    image_processor: ImageProcessor
    vae_scale_factor: int
    cached_calls: list[dict[str, int]]
    """What a ``cache`` option leaves on its pipeline: steps computed, skipped and so on in each call."""

    load_lora_weights: Callable[..., None]
    magnitudes: Any
    """What a calibration leaves on its pipeline."""

    encode_prompt: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """Prompts -> (embeddings, position ids)."""
    prepare_latents: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """-> (noise, position ids)."""
    _prepare_text_ids: Callable[..., torch.Tensor]
    _prepare_latent_ids: Callable[..., torch.Tensor]
    progress_bar: Callable[..., AbstractContextManager[ProgressBar]]

    @property
    def config(self) -> FrozenDict: ...

    @property
    def components(self) -> Mapping[str, Component]: ...

    def __call__(self, **arguments: Any) -> PipelineOutput: ...

    def enable_sequential_cpu_offload(self, *, device: str) -> None: ...

    def maybe_free_model_hooks(self) -> None: ...

    def set_progress_bar_config(self, *, disable: bool) -> None: ...

    def save_pretrained(self, folder: Path, *, variant: str | None, max_shard_size: int | str) -> None: ...


class PipelineOutput(Protocol):
    """What a call of a pipeline returns, by default with PIL pictures."""

    images: list[Image]


class ImageProcessor(Protocol):
    """Makes pictures of what the VAE has decoded."""

    postprocess: Callable[..., list[Image] | np.ndarray | torch.Tensor]
    apply_overlay: Callable[..., Image]
    meanwhile: Callable[[], None]
    """Where the fast decoder finds it, called while a GPU is at the pictures."""

    @property
    def config(self) -> FrozenDict: ...


class ProgressBar(Protocol):
    """What a pipeline does with its progress bar."""

    def update(self, n: int = 1) -> bool | None: ...
