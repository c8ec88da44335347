"""The ``model`` group: which FLUX.2 weights, in which dtype, and the call arguments that are their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fluxrun.architectures import ArchitectureName, PipelineKind, architecture, family
from fluxrun.errors import ConfigError
from fluxrun.hardware.machine import Machine
from fluxrun.options.base import NOTHING_MORE, Option
from fluxrun.paths import expanded
from fluxrun.trust import Closed, Open, OpenWhere

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]

PACKAGE = Path(__file__).resolve().parents[1]
BUNDLED = (PACKAGE / "bundled", PACKAGE.parents[1] / "models")
"""Where models that come with fluxrun lie: in an installed wheel, and in the repository."""


class Flux2Model(Option):
    """A FLUX.2 model: a hub id, a diffusers folder on disk, or random weights of its real architecture."""

    id: Annotated[str | None, Closed("what it names is downloaded")] = None
    """Hugging Face hub id, for example black-forest-labs/FLUX.2-klein-4B."""

    path: Annotated[Path | None, Closed("it names a folder of this machine, which is read")] = None
    """A folder in diffusers layout; used instead of ``id`` and ``bundled``."""

    bundled: Annotated[str | None, OpenWhere(r"[\w-]+", "it leads out of fluxrun's own folder")] = None
    """Name of a model that comes with fluxrun, for example shapes."""

    weights: Open[Literal["pretrained", "random"]] = "pretrained"
    """``random`` builds the architecture on the device without any download: real speed, no picture."""

    architecture: Open[ArchitectureName | None] = None
    """Sizes used for ``weights=random`` (dev, klein_4b, klein_9b or tiny)."""

    pipeline: Open[PipelineKind | None] = None
    """``klein`` and ``dev``: a checkpoint folder, which knows, overrules it. With klein weights also ``klein_inpaint``
    (repaints the white part of ``mask_image``) and ``klein_kv`` (``reference_images`` take part in the first step and
    are remembered after it: made for FLUX.2-klein-9b-kv, other klein weights draw a little differently)."""

    distilled: Open[bool | None] = None
    """Few-step model without guidance; a checkpoint folder, which knows, overrules it."""

    revision: Annotated[str | None, Closed("what it names is downloaded")] = None
    """Branch, tag or commit on the hub."""

    variant: Annotated[str | None, OpenWhere(r"\w+", "it is part of the names of files")] = None
    """Weight-file variant, for example fp16 (``*.fp16.safetensors``)."""

    dtype: Open[DtypeName] = "bfloat16"
    """Number format of the weights; ``auto`` is float32 on a CPU, bfloat16 on a GPU (float16 if it has none)."""

    offline: Open[bool] = False
    """Never ask the hub; use what is in its cache."""

    max_sequence_length: Open[int] = Field(default=512, ge=8, le=512)
    """Text tokens the prompt is padded to; all of them are attended to, so fewer is faster."""

    text_encoder_out_layers: Open[tuple[int, ...] | None] = None
    """Hidden states read from the text encoder; None is the pipeline's own choice."""

    text_encoder_layers: Open[Literal["needed", "all"]] = "needed"
    """``needed`` leaves out what no embedding is made of: the layers behind the last one read, the final norm and the
    language-model head, none of which is loaded or run; ``all`` keeps them (for diffusers' ``upsample_prompt``)."""

    steps: Open[int | None] = Field(default=4, ge=1)
    """Denoising steps when the run does not say; None goes by whether the checkpoint is distilled."""

    guidance: Open[float | None] = Field(default=None, ge=0, allow_inf_nan=False)
    """Guidance scale when the run does not say; None goes by whether the checkpoint is distilled."""

    height: Open[int] = Field(default=1024, ge=16, multiple_of=16)
    """Picture height in pixels when the run does not say."""

    width: Open[int] = Field(default=1024, ge=16, multiple_of=16)
    """Picture width in pixels when the run does not say."""

    @model_validator(mode="after")
    def _sizes_exist(self) -> Flux2Model:
        if self.architecture:
            architecture(self.architecture, self.pipeline)
        return self

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE

    @property
    def classifier_free(self) -> bool:
        """Whether a guidance above 1 calls the transformer twice a step: a klein model that is not distilled."""
        return self.pipeline in ("klein", "klein_inpaint") and self.distilled is False

    def folder(self) -> Path | None:
        """The checkpoint folder this option names (``~`` expanded), or None for a hub id.

        Raises ConfigError when a bundled model is not there.
        """
        if self.path is not None:
            return expanded(self.path)
        if self.bundled is None:
            return None
        found = next((root / self.bundled for root in BUNDLED if os.path.isdir(root / self.bundled)), None)
        if found is None:
            places = " or ".join(str(root) for root in BUNDLED)
            raise ConfigError(f"model.bundled={self.bundled}: no such folder in {places}; give model.path instead")
        return found

    def source(self) -> str:
        """Where the weights come from, as one string: part of the weight store's key."""
        if self.weights == "random":
            of_family = f" {family(self.pipeline or 'klein')}" if self.architecture == "tiny" else ""
            return f"random {self.architecture}{of_family}"
        folder = self.folder()
        return str(folder.resolve()) if folder else f"hub {self.id}"

    def default_steps(self, distilled: bool) -> int:
        """Denoising steps when the run does not say: few for a distilled checkpoint, the usual 50 for another."""
        return self.steps or (4 if distilled else 50)

    def default_guidance(self, distilled: bool) -> float | None:
        """Guidance scale when the run does not say; None for a distilled checkpoint, which has none."""
        return None if distilled else 4.0 if self.guidance is None else self.guidance

    def dtype_on(self, machine: Machine) -> str:
        """The dtype ``auto`` means on the run's device."""
        if self.dtype != "auto":
            return self.dtype
        if not machine.accelerated:
            return "float32"
        return "float16" if machine.gpu and machine.gpu.capability < (8, 0) else "bfloat16"

    def requires(self, machine: Machine) -> str | None:
        dtype = self.dtype_on(machine)
        if machine.gpu and dtype == "bfloat16" and machine.gpu.capability < (8, 0):
            return f"{machine.gpu.name} has no bfloat16 (use model.dtype=float16)"
        from_hub = self.weights == "pretrained" and not (self.path or self.bundled)
        if from_hub and self.pipeline == "dev" and machine.lacks("torchvision"):
            return "FLUX.2-dev's text processor needs torchvision (pip install 'fluxrun[dev]')"
        return None
