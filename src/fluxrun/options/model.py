"""The ``model`` group: which FLUX.2 weights, in which dtype, and the call arguments that are their own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from fluxrun.config import Option
from fluxrun.machine import Machine

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]


class Flux2Model(Option):
    """A FLUX.2 model: a hub id, a diffusers folder on disk, or random weights of its real architecture."""

    id: str | None = None
    """Hugging Face hub id, for example black-forest-labs/FLUX.2-klein-4B."""

    path: Path | None = None
    """A folder in diffusers layout; used instead of ``id``."""

    weights: Literal["pretrained", "random"] = "pretrained"
    """``random`` builds the architecture on the device without any download: real speed, no picture."""

    architecture: Literal["dev", "klein_4b", "klein_9b", "tiny"] | None = None
    """Sizes used for ``weights=random``."""

    pipeline: Literal["klein", "dev"] | None = None
    """Flux2KleinPipeline or Flux2Pipeline; None reads it from the checkpoint folder."""

    distilled: bool | None = None
    """Few-step model without guidance; None reads it from the checkpoint folder."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    variant: str | None = None
    """Weight-file variant, for example fp16 (``*.fp16.safetensors``)."""

    dtype: DtypeName = "bfloat16"
    """Number format of the weights; ``auto`` is bfloat16 on an accelerator and float32 on a CPU."""

    offline: bool = False
    """Never ask the hub; use what is in its cache."""

    max_sequence_length: int = Field(512, ge=8, le=512)
    """Text tokens the prompt is padded to; all of them are attended to, so fewer is faster."""

    text_encoder_out_layers: tuple[int, ...] | None = None
    """Hidden states read from the text encoder; None is the pipeline's own choice."""

    steps: int = Field(4, ge=1)
    """Denoising steps when the run does not say."""

    guidance: float | None = None
    """Guidance scale when the run does not say; None for distilled models."""

    height: int = Field(1024, ge=16, multiple_of=16)
    """Picture height in pixels when the run does not say."""

    width: int = Field(1024, ge=16, multiple_of=16)
    """Picture width in pixels when the run does not say."""

    def dtype_on(self, machine: Machine) -> str:
        """The dtype ``auto`` means on the run's device."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if machine.accelerated else "float32"

    def requires(self, machine: Machine) -> str | None:
        dtype = self.dtype_on(machine)
        if machine.gpu and dtype == "bfloat16" and machine.gpu.capability < (8, 0):
            return f"{machine.gpu.name} has no bfloat16 (use model.dtype=float16)"
        return None
