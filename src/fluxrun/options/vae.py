"""The ``vae`` group: how latents become pixels (whole, in tiles, picture by picture; by which decoder)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fluxrun.hardware.machine import Machine
from fluxrun.options.base import NOTHING_MORE, Context, Facts, Option, Resolution, Workload
from fluxrun.options.compile import CompileOption
from fluxrun.trust import Open
from fluxrun.types import Pipeline

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
    from torch import nn

AUTO_TILING_PIXELS = 1536 * 1536


def decode_bytes(height: int, width: int) -> int:
    """Working memory of decoding a picture whole: ten full-size buffers of 128 two-byte channels.

    1024x1024: 2.68 GB, which is what klein-4B's peak was above its weights (benchmarks/results/klein4b_sweep_h100).
    """
    return height * width * 128 * 2 * 10


class VaeOption(Option):
    """The knobs all VAE options share."""

    tile_size: Open[int] = Field(512, ge=64, multiple_of=16)
    """Edge of a tile in pixels."""

    tile_overlap: Open[float] = Field(0.25, ge=0, lt=1)
    """Share of a tile that overlaps its neighbour."""

    channels_last: Open[bool] = False
    """Channels-last weights; applied only when the decoder is compiled too."""

    def decoded_at_once(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of what the decoder is given at once, of a picture of this size."""
        return height, width

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE

    @property
    def splits_batches(self) -> bool:
        """Whether the pictures of a batch are decoded one by one."""
        return False


class AutoVae(VaeOption):
    """Tiles above 1536×1536 pixels, or when the memory estimate leaves no room for a whole picture."""

    def resolve(self, workload: Workload) -> Resolution:
        height, width, gpu = workload.height, workload.width, workload.machine.gpu
        if height * width > AUTO_TILING_PIXELS:
            return Resolution("tiled", f"{width}x{height} is larger than 1536x1536")
        if gpu is not None and decode_bytes(height, width) > gpu.free_bytes:
            return Resolution("tiled", f"decoding {width}x{height} whole would not fit into the free GPU memory")
        return Resolution("full", f"{width}x{height} is not larger than 1536x1536 and fits")


class Vae(VaeOption):
    """Whole, tiled or sliced decoding."""

    decode: Open[Literal["full", "tiled", "sliced"]] = "full"
    """How the decoder is called."""

    def decoded_at_once(self, height: int, width: int) -> tuple[int, int]:
        edge = self.tile_size if self.decode == "tiled" else max(height, width)
        return min(height, edge), min(width, edge)

    @property
    def splits_batches(self) -> bool:
        return self.decode == "sliced"

    def inapplicable(self, workload: Workload) -> str | None:
        height, width = workload.height, workload.width
        if self.decode == "tiled" and max(height, width) <= self.tile_size:
            return f"{width}x{height} fits into one {self.tile_size}-pixel tile (vae.tile_size): nothing to tile"
        if self.decode == "sliced" and workload.batch_size < 2:
            return "slicing splits a batch, and batch_size is 1: nothing to slice"
        return None

    def unused_knobs(self) -> list[str]:
        tiling = () if self.decode == "tiled" else ("tile_size", "tile_overlap")
        return [knob for knob in self.changed_knobs() if knob in tiling]

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        facts = {"full": self._full, "tiled": self._tiled, "sliced": self._sliced}[self.decode](pipeline, context)
        if self.channels_last:
            facts["channels_last"] = _channels_last(pipeline, context)
        return facts

    def observe(self, pipeline: Pipeline, context: Context) -> Facts:
        """Decoder calls counted while the pictures were decoded."""
        counted = {"tiled": "tiles_decoded", "sliced": "slices_decoded"}.get(self.decode)
        return {counted: context.counters["vae_decoder_calls"]} if counted else {}

    def _full(self, pipeline: Pipeline, context: Context) -> Facts:
        pipeline.vae.disable_tiling()
        pipeline.vae.disable_slicing()
        return {}

    def _tiled(self, pipeline: Pipeline, context: Context) -> Facts:
        vae = pipeline.vae
        vae.enable_tiling()
        # diffusers' default tile is the full training size (1024), so that asking for tiles does nothing there.
        vae.tile_sample_min_size = self.tile_size
        vae.tile_latent_min_size = self.tile_size // pipeline.vae_scale_factor
        vae.tile_overlap_factor = self.tile_overlap
        _count_decoder_calls(vae, context)
        return {"tile_size": self.tile_size, "tile_overlap": self.tile_overlap}

    def _sliced(self, pipeline: Pipeline, context: Context) -> Facts:
        pipeline.vae.enable_slicing()
        _count_decoder_calls(pipeline.vae, context)
        return {}


class FastVae(Vae):
    """The same weights in a decoder of our own: less arithmetic, fewer passes over the picture, nothing to compile.

    Each upsampling becomes one transposed convolution, GroupNorm and SiLU run in Triton kernels on a GPU, and pixels
    are rounded to bytes on their device.
    """

    autotune: Open[bool] = False
    """Let cuDNN time its convolution kernels at the first picture of a size; it may choose others the next time."""

    def requires(self, machine: Machine) -> str | None:
        if not machine.device.startswith("cuda") or "triton" in machine.packages:
            return None
        return "triton is not installed; it comes with torch's CUDA builds"

    def inapplicable(self, workload: Workload) -> str | None:
        if self.decode == "sliced":
            return super().inapplicable(workload)
        return None  # one tile is decoded whole: no reason to give up the rest

    def unused_knobs(self) -> list[str]:
        return [*super().unused_knobs(), *(["channels_last"] if self.channels_last else [])]

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """Swap the decoder, and compare the two on a small picture. Facts: what was replaced, and the difference."""
        import torch

        from fluxrun.kernels.vae.decoder import fast_decoder, round_on_device, trial

        vae = pipeline.vae
        decoder = fast_decoder(vae.decoder, context.device)
        if self.autotune:
            torch.backends.cudnn.benchmark = True  # put back by ProcessState
        difference = trial(decoder, vae.decoder)
        vae.register_module("decoder", decoder)
        round_on_device(pipeline.image_processor)
        how = {"full": self._full, "tiled": self._tiled, "sliced": self._sliced}[self.decode]
        return {**how(pipeline, context), **decoder.facts(), "difference": difference}


def _count_decoder_calls(vae: AutoencoderKLFlux2, context: Context) -> None:
    """Count through post_quant_conv, which runs once per tile or slice and is never compiled itself."""

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        context.counters["vae_decoder_calls"] += 1

    (vae.post_quant_conv or vae.decoder.conv_in).register_forward_hook(count)


def _channels_last(pipeline: Pipeline, context: Context) -> str:
    import torch

    option = context.option(CompileOption, "compile")
    if "vae_decoder" not in option.targets or not option.active:
        return "not applied: alone it is slower (needs compile.targets=[vae_decoder,...])"
    pipeline.vae.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
    return "applied"
