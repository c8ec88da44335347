"""What becomes of the pictures that a run is given before the pipeline has them, and which it cannot use. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

from fluxrun.architectures import LARGEST_REFERENCE, PATCH_PIXELS, PipelineKind
from fluxrun.config.inputs import IMAGE, MASK, REFERENCES, InputPicture
from fluxrun.config.schema import ReferenceResize, RunConfig
from fluxrun.errors import ConfigError
from fluxrun.formatting import shorten
from fluxrun.options.model import Flux2Model

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST_REFERENCE = 64
"""Edge in pixels below which the pipelines refuse a reference picture."""
MOST_OBLONG = 8
"""The same for how many times longer one edge is than the other."""

INPAINTING = (IMAGE, MASK, "strength", "padding_mask_crop")
"""The run's keys that are klein_inpaint's alone."""


@dataclass(frozen=True)
class Pictures:
    """The pictures that the pipeline is called with."""

    references: Sequence[Image] = ()
    image: Image | None = None
    mask: Image | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that the picture to repaint dictates."""
        return None if self.image is None else inpainted_size(self.image)

    @property
    def tokens(self) -> int:
        """Tokens that they add to the transformer's sequence."""
        if self.image is None:
            return reference_tokens(self.references)
        return reference_tokens([self.image, *self.references])  # inpainting looks at the picture itself, too

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """What must agree for a built pipeline to be used again."""
        return [picture.size for picture in (*self.references, self.image, self.mask) if picture is not None]

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        """The pipeline call's arguments that are pictures, and those about them."""
        if self.image is None:
            return {"image": list(self.references)} if self.references else {}
        optional = {"strength": config.strength, "padding_mask_crop": config.padding_mask_crop}
        return {
            "image": self.image,
            "mask_image": self.mask,
            **{name: value for name, value in optional.items() if value is not None},
            **({"image_reference": list(self.references)} if self.references else {}),
        }


def prepared_pictures(config: RunConfig, model: Flux2Model, inputs: Sequence[InputPicture], images: int) -> Pictures:
    """The pictures as the pipeline gets them, to draw so many images.

    Raises ConfigError for what it cannot use, or would ignore.
    """
    check_keys(config, model.pipeline)
    image, mask = _image_and_mask(config, inputs)
    size = (config.height or model.height, config.width or model.width) if image is None else inpainted_size(image)
    given = [each for each in inputs if each.key == REFERENCES]
    references = [resized(each.picture, config.reference_resize, size) for each in given]
    for each, picture in zip(given, references, strict=True):
        _check_reference(each, picture)
    if image is not None:
        _check_inpainting(config, references, size, images)
    return Pictures(references, image, mask)


def reference_tokens(pictures: Sequence[Image]) -> int:
    """Tokens that reference pictures add to the transformer's sequence."""
    areas = (min(picture.width * picture.height, LARGEST_REFERENCE**2) for picture in pictures)
    return sum(area // PATCH_PIXELS**2 for area in areas)


def resized(picture: Image, how: ReferenceResize, size: tuple[int, int]) -> Image:
    """A reference picture for a drawing of this height and width, before the pipeline's own limit of its area."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    edges = size[1], size[0]
    if how == "area":
        return picture
    if how == "stretch":
        return picture.resize(edges, Resampling.LANCZOS)
    if how == "fit":
        return ImageOps.contain(picture, edges, Resampling.LANCZOS)
    return ImageOps.fit(picture, edges, Resampling.LANCZOS)


def check_keys(config: RunConfig, pipeline: PipelineKind | None) -> None:
    """Refuse a key that is another pipeline's, and inpainting that lacks a picture."""
    given = [key for key in INPAINTING if getattr(config, key) is not None]
    if pipeline != "klein_inpaint" and given:
        raise ConfigError(f"{given[0]}: only model.pipeline=klein_inpaint uses it, this run's is {pipeline}")
    lacking = [key for key in (IMAGE, MASK) if pipeline == "klein_inpaint" and key not in given]
    if lacking:
        raise ConfigError(f"model.pipeline=klein_inpaint needs {' and '.join(lacking)}: give {lacking[0]}=FILE")


def _check_reference(given: InputPicture, picture: Image) -> None:
    """What diffusers' ``check_image_input`` refuses, before anything is loaded."""
    width, height = picture.size
    if min(width, height) < SMALLEST_REFERENCE:
        problem = f"at least {SMALLEST_REFERENCE} pixels each way are needed"
    elif max(width, height) > MOST_OBLONG * min(width, height):
        problem = f"one edge may be at most {MOST_OBLONG} times the other"
    else:
        return
    raise ConfigError(f"{given.key}: {shorten(given.path)} would be used at {width}x{height}: {problem}")


# --- inpainting -----------------------------------------------------------------------------------------------------


def limited(picture: Image) -> Image:
    """The picture, scaled down to the pipelines' largest area where it is larger, as they do it."""
    from PIL.Image import Resampling

    return picture.resize(_limited_size(picture), Resampling.LANCZOS)


def inpainted_size(image: Image) -> tuple[int, int]:
    """Height and width at which diffusers' pipeline repaints a picture: its own, up to the largest area, in patches."""
    width, height = _limited_size(image)
    return height // PATCH_PIXELS * PATCH_PIXELS, width // PATCH_PIXELS * PATCH_PIXELS


def _limited_size(picture: Image) -> tuple[int, int]:
    width, height = picture.size
    if width * height <= LARGEST_REFERENCE**2:
        return width, height
    scale = sqrt(LARGEST_REFERENCE**2 / (width * height))
    return int(width * scale), int(height * scale)


def _image_and_mask(config: RunConfig, inputs: Sequence[InputPicture]) -> tuple[Image | None, Image | None]:
    found = {each.key: each.picture for each in inputs if each.key in (IMAGE, MASK)}
    if not found:
        return None, None
    image, mask = found[IMAGE], found[MASK].convert("L")
    if mask.size != image.size:
        sizes = [f"{width}x{height}" for width, height in (mask.size, image.size)]
        raise ConfigError(
            f"mask_image: {config.mask_image} has {sizes[0]} pixels, image has {sizes[1]}: make them one size"
        )
    if 0 in inpainted_size(image):
        raise ConfigError(f"image: {config.image} is less than {PATCH_PIXELS} pixels high or wide")
    if not any(mask.histogram()[128:]):
        raise ConfigError(f"mask_image: {config.mask_image} is black all over: white is what is repainted")
    if config.padding_mask_crop is not None:  # diffusers crops the mask as it is, and the picture once it is limited
        image, mask = limited(image), limited(mask)
    return image, mask


def _check_inpainting(config: RunConfig, references: Sequence[Image], size: tuple[int, int], images: int) -> None:
    """Refuse what diffusers' pipeline would overrule or misread; ``images``: how many the run draws."""
    for key, asked, own in zip(("height", "width"), (config.height, config.width), size, strict=True):
        if asked not in (None, own):
            raise ConfigError(
                f"{key}={asked}: klein_inpaint draws at its image's size ({size[1]}x{size[0]}); leave it out"
            )
    if len({picture.size for picture in references}) > 1:
        raise ConfigError("reference_images: klein_inpaint takes several of one size only: give reference_resize=crop")
    if len(references) > 1 and len(references) in (min(config.batch_size, images), images % config.batch_size):
        raise ConfigError(
            f"batch_size={config.batch_size}: klein_inpaint would give each picture of a batch of {len(references)} "
            f"one of the {len(references)} references; give another batch_size"
        )
