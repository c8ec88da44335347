"""The FLUX.2 VAE decoder with the same weights and less work; ``vae=fast`` puts it into a pipeline's shell.

Three things differ from diffusers' decoder, all of them exact in real numbers:

- *Upsampling.* Nearest ×2 and then a 3×3 convolution reads every pixel four times over. The same is one transposed
  convolution with a 4×4 kernel and stride 2: 4/9 of the multiplications, and the enlarged picture is never written.
- *Between convolutions.* Biases are not added by passes of their own but by whoever reads next, and the kernels in
  ``triton_ops.py`` do GroupNorm and SiLU in channels-last, where convolutions are fastest.
- *Attention.* Its single head of 512 channels is too wide for flash kernels: two matmuls and a softmax are faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from PIL import Image
from torch import nn

from fluxrun.kernels.vae.known_parts import (
    check_silu,
    known_attention,
    known_block,
    known_convolution,
    of_class,
    plain_convolution,
)
from fluxrun.types import ImageProcessor

if TYPE_CHECKING:
    import numpy as np

    from fluxrun.kernels.vae.triton_ops import Partials

TRIAL_SIZE = 8
"""Edge of the trial's latents."""

LARGEST_DIFFERENCE = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 0.1}
"""Relative L2 between two decoders: float32 convolutions may use TF32, and noise is far from what a decoder knows."""


class Hidden(NamedTuple):
    """A picture between two layers."""

    data: torch.Tensor
    """[samples, channels, height, width], channels-last"""
    bias: torch.Tensor | None = None
    """float32 [channels] that belongs to it but was not added yet"""
    statistics: Partials | None = None
    """What the kernel that wrote it already knows about its groups"""


class Norm(nn.Module):
    """A GroupNorm's numbers, float32."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.register_buffer("weight", norm.weight.detach().float(), persistent=False)
        self.register_buffer("bias", norm.bias.detach().float(), persistent=False)


class Ops(Protocol):
    """What lies between the convolutions."""

    def norm(self, x: Hidden, norm: Norm, *, silu: bool) -> torch.Tensor:
        """GroupNorm of a picture, its bias included, then SiLU."""

    def add(self, x: Hidden, residual: torch.Tensor, groups: int) -> Hidden:
        """A picture, its bias included, plus another; ``groups`` are the next norm's."""

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of one head, [samples, tokens, channels] each."""


class TorchOps:
    """Plain torch, for any device."""

    def norm(self, x: Hidden, norm: Norm, *, silu: bool) -> torch.Tensor:
        """torch's GroupNorm and SiLU, in the picture's dtype."""
        data, dtype = _with_bias(x), x.data.dtype
        data = F.group_norm(data, norm.groups, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
        return F.silu(data) if silu else data

    def add(self, x: Hidden, residual: torch.Tensor, groups: int) -> Hidden:
        """The sum, without statistics: torch's GroupNorm takes its own."""
        return Hidden(_with_bias(x) + residual)

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """torch's attention, with the one head as an axis of its own."""
        query, key, value = (part.unsqueeze(1) for part in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).squeeze(1)


class TritonOps:
    """Fused kernels, for a CUDA GPU and channel counts that are powers of two."""

    def __init__(self) -> None:
        from fluxrun.kernels.vae import triton_ops

        self.kernels = triton_ops

    def norm(self, x: Hidden, norm: Norm, *, silu: bool) -> torch.Tensor:
        """One pass for bias, norm and SiLU; one more before it if the picture came without statistics."""
        data = x.data.contiguous(memory_format=torch.channels_last)
        statistics = x.statistics or self.kernels.statistics(data, x.bias, norm.groups)
        numbers = (norm.weight, norm.bias, norm.eps)
        return self.kernels.normalize(data, x.bias, statistics, numbers, norm.groups, silu=silu)

    def add(self, x: Hidden, residual: torch.Tensor, groups: int) -> Hidden:
        """One pass for the sum and the statistics that the next norm needs. May overwrite ``x``."""
        data, residual = (part.contiguous(memory_format=torch.channels_last) for part in (x.data, residual))
        data, statistics = self.kernels.add(data, x.bias, residual, groups)
        return Hidden(data, None, statistics)

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Two matmuls and a softmax kernel, some rows of the matrix at a time."""
        return self.kernels.attention(query, key, value)


class ResBlock(nn.Module):
    """A ``ResnetBlock2D``. ``incoming`` is the bias its input will still lack, known beforehand."""

    bias1: torch.Tensor
    bias2: torch.Tensor

    def __init__(self, module: nn.Module, ops: Ops, incoming: torch.Tensor | None) -> None:
        super().__init__()
        block = known_block(module)
        self.ops = ops
        self.norm1, self.norm2 = Norm(block.norm1), Norm(block.norm2)
        self.conv1, self.conv2 = _weight(block.conv1), _weight(block.conv2)
        self.shortcut = None if block.conv_shortcut is None else _weight(block.conv_shortcut)
        self.register_buffer("bias1", _bias(block.conv1), persistent=False)
        self.register_buffer("bias2", _bias(block.conv2) + _through_shortcut(block, incoming), persistent=False)

    def forward(self, x: Hidden) -> Hidden:
        """A picture with nothing left to add."""
        data = F.conv2d(self.ops.norm(x, self.norm1, silu=True), self.conv1, padding=1)
        data = F.conv2d(self.ops.norm(Hidden(data, self.bias1), self.norm2, silu=True), self.conv2, padding=1)
        residual = x.data if self.shortcut is None else F.conv2d(x.data, self.shortcut)
        return self.ops.add(Hidden(data, self.bias2), residual, self.norm2.groups)


class AttentionBlock(nn.Module):
    """The middle's self-attention over all pixels, queries, keys and values in one matmul."""

    bias_out: torch.Tensor

    def __init__(self, module: nn.Module, ops: Ops) -> None:
        super().__init__()
        attention, norm, out = known_attention(module)
        self.ops, self.norm = ops, Norm(norm)
        parts = (attention.to_q, attention.to_k, attention.to_v)
        self.project_in = _frozen(torch.cat([part.weight.detach() for part in parts]))
        self.bias_in = _frozen(torch.cat([part.bias.detach() for part in parts]))
        self.project_out = _frozen(out.weight.detach())
        self.register_buffer("bias_out", out.bias.detach().float(), persistent=False)

    def forward(self, x: Hidden) -> Hidden:
        """A picture with nothing left to add."""
        samples, channels, height, width = x.data.shape
        rows = self.ops.norm(x, self.norm, silu=False).permute(0, 2, 3, 1).reshape(samples, -1, channels)
        query, key, value = F.linear(rows, self.project_in, self.bias_in).chunk(3, dim=-1)
        rows = F.linear(self.ops.attention(query, key, value), self.project_out)
        data = rows.view(samples, height, width, channels).permute(0, 3, 1, 2)
        return self.ops.add(Hidden(data, self.bias_out), x.data, self.norm.groups)


class Upsampler(nn.Module):
    """Nearest ×2 and a 3×3 convolution as one transposed convolution; its bias is left to the next layer."""

    bias: torch.Tensor

    def __init__(self, upsampler: nn.Module) -> None:
        super().__init__()
        conv = known_convolution(upsampler)
        self.weight = _frozen(upsampling_weight(conv.weight.detach()))
        self.register_buffer("bias", _bias(conv), persistent=False)

    def forward(self, x: Hidden) -> Hidden:
        """Twice as high and wide; ``x`` must have nothing left to add, or the borders would differ."""
        return Hidden(F.conv_transpose2d(x.data, self.weight, stride=2, padding=1), self.bias)


class FastDecoder(nn.Module):
    """Stands in for a ``Decoder``. Weights are copies in channels-last, in the order in which they are used."""

    bias_in: torch.Tensor

    def __init__(self, decoder: Decoder, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.conv_in = _weight(decoder.conv_in)
        self.register_buffer("bias_in", _bias(decoder.conv_in), persistent=False)
        self.layers = nn.Sequential(*self._layers(decoder))
        self.norm_out = Norm(of_class(decoder.conv_norm_out, nn.GroupNorm, "the last norm"))
        self.conv_out = _weight(decoder.conv_out)
        self.bias_out = _frozen(plain_convolution(decoder.conv_out)[1].detach())
        check_silu(decoder.conv_act)

    def forward(self, sample: torch.Tensor, latent_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """Latents [samples, channels, height, width] -> pictures [samples, 3, 8 * height, 8 * width]."""
        if latent_embeds is not None:
            raise NotImplementedError("vae=fast takes no latent embeddings")
        sample = sample.contiguous(memory_format=torch.channels_last)
        x = self.layers(Hidden(F.conv2d(sample, self.conv_in, padding=1), self.bias_in))
        return F.conv2d(self.ops.norm(x, self.norm_out, silu=True), self.conv_out, self.bias_out, padding=1)

    def _layers(self, decoder: Decoder) -> list[nn.Module]:
        middle = decoder.mid_block
        first, *others = middle.resnets
        layers: list[nn.Module] = [ResBlock(first, self.ops, self.bias_in)]
        for attention, block in zip(middle.attentions, others, strict=True):
            layers += [] if attention is None else [AttentionBlock(attention, self.ops)]
            layers.append(ResBlock(block, self.ops, None))
        for up_block in decoder.up_blocks:
            level = of_class(up_block, UpDecoderBlock2D, "a level")
            for block in level.resnets:
                before = layers[-1]
                layers.append(ResBlock(block, self.ops, before.bias if isinstance(before, Upsampler) else None))
            layers += [Upsampler(upsampler) for upsampler in level.upsamplers or ()]
        return layers

    def facts(self) -> dict[str, Any]:
        """What was replaced, and how much memory the derived weights take."""
        kinds = Counter(type(module).__name__ for module in self.modules())
        tensors = [*self.parameters(), *self.buffers()]
        return {
            "upsamplers": kinds["Upsampler"],
            "norms": kinds["Norm"],
            "attentions": kinds["AttentionBlock"],
            "kernels": type(self.ops).__name__.removesuffix("Ops").lower(),
            "derived_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        }


def fast_decoder(decoder: Decoder, device: str) -> FastDecoder:
    """The fast decoder of a ``Decoder`` that will run on ``device``; the original stays as it was.

    Raises ValueError when it has a part that is not known here.
    """
    norms = [norm for norm in decoder.modules() if isinstance(norm, nn.GroupNorm)]
    sizes = [size for norm in norms for size in (norm.num_channels, norm.num_groups)]
    # The kernels hold all channels of some pixels in a block, whose edges must be powers of two.
    fused = device.startswith("cuda") and all(size & (size - 1) == 0 for size in sizes)
    return FastDecoder(decoder, TritonOps() if fused else TorchOps())


def trial(fast: FastDecoder, original: Decoder) -> float:
    """Decode a small picture with both; returns the relative L2 difference. Compiles the kernels on the way.

    Raises RuntimeError for a difference that rounding does not explain.
    """
    weight = original.conv_in.weight
    noise = torch.randn(1, weight.shape[1], TRIAL_SIZE, TRIAL_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = original(noise.to(weight)).float()
        difference = float(((fast(noise.to(weight)).float() - expected).norm() / expected.norm()).item())
    if not difference < LARGEST_DIFFERENCE[weight.dtype]:
        raise RuntimeError(f"the fast decoder's picture differs from diffusers' by {difference:.2g} (relative L2)")
    return difference


def upsampling_weight(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, 3, 3] after nearest ×2 -> [in, out, 4, 4] of a transposed convolution with stride 2 and padding 1.

    An even output row is between its two nearest input rows: taps 1 and 2 fall on one and the same, tap 0 on the one
    before; an odd row the other way round. A transposed convolution lays rows 1 and 3 of its kernel on even rows, 0
    and 2 on odd ones.
    """
    taps = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32, device=weight.device)
    summed = torch.einsum("ay,oiyx,bx->ioab", taps, weight.float(), taps)
    return summed.to(weight.dtype).contiguous(memory_format=torch.channels_last)


def pictures(
    image: torch.Tensor, *, denormalize: bool = True, meanwhile: Callable[[], None] | None = None
) -> list[Image.Image]:
    """What ``VaeImageProcessor.postprocess`` makes of a decoded batch, rounded on its device: one byte a value moves.

    ``image``: [samples, 3, height, width] in [-1, 1], or in [0, 1] with ``denormalize=False``. The bytes are exactly
    the same: scaling and clamping in the tensor's own dtype, then float32. ``meanwhile`` is called when the device has
    been given all of that, and has not done it: what is given to it then does not delay these pictures.
    """
    image = (image * 0.5 + 0.5).clamp(0, 1) if denormalize else image
    samples, _, height, width = image.shape
    # Four bytes a pixel, as Pillow keeps them: it copies these as they are and need not spread them out.
    rounded = torch.full((samples, height, width, 4), 255, dtype=torch.uint8, device=image.device)
    rounded[..., :3] = (image.permute(0, 2, 3, 1).float() * 255).round()
    # Made while a GPU still decodes: their memory is new, and the system takes a millisecond to give it out.
    made = [Image.new("RGB", (width, height)) for _ in range(samples)]
    arriving = on_cpu(rounded)
    if meanwhile is not None:
        meanwhile()
    for picture, rows in zip(made, arriving, strict=True):
        picture.frombytes(rows.numpy(), "raw", "RGBX")
    return made


def on_cpu(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Begin to copy the samples to the CPU; each one is waited for when it is asked for.

    From a GPU they go into page-locked memory: torch keeps it and gives it out again, so that no page of it is new.
    """
    if not values.is_cuda:
        return iter(values)
    copies = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    arrived = []
    for there, here in zip(values, copies, strict=True):
        here.copy_(there, non_blocking=True)
        arrived.append(torch.cuda.Event())
        arrived[-1].record()
    return _as_they_arrive(copies, arrived)


def _as_they_arrive(copies: torch.Tensor, arrived: Sequence[torch.cuda.Event]) -> Iterator[torch.Tensor]:
    for here, event in zip(copies, arrived, strict=True):
        event.synchronize()
        yield here


def round_on_device(processor: ImageProcessor) -> None:
    """Let a pipeline's image processor make PIL pictures with ``pictures``; anything else it makes as before.

    A ``meanwhile`` that is set on the processor is called while these are waited for.
    """
    original = processor.postprocess

    def postprocess(
        image: torch.Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        colour = isinstance(image, torch.Tensor) and image.ndim == 4 and image.shape[1] == 3
        if output_type != "pil" or do_denormalize is not None or not colour:
            return original(image, output_type=output_type, do_denormalize=do_denormalize)
        meanwhile = getattr(processor, "meanwhile", None)
        return pictures(image, denormalize=processor.config["do_normalize"], meanwhile=meanwhile)

    processor.postprocess = postprocess


# --- weights --------------------------------------------------------------------------------------


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _weight(conv: nn.Module) -> nn.Parameter:
    """A convolution's weight in channels-last."""
    return _frozen(plain_convolution(conv)[0].detach().contiguous(memory_format=torch.channels_last))


def _bias(conv: nn.Module) -> torch.Tensor:
    return plain_convolution(conv)[1].detach().float().clone()


def _through_shortcut(block: ResnetBlock2D, incoming: torch.Tensor | None) -> torch.Tensor | float:
    """What the input's pending bias and the shortcut's own add to the output."""
    if block.conv_shortcut is None:
        return 0.0 if incoming is None else incoming
    own = _bias(block.conv_shortcut)
    return own if incoming is None else own + block.conv_shortcut.weight.detach().float()[:, :, 0, 0] @ incoming


def _with_bias(x: Hidden) -> torch.Tensor:
    return x.data if x.bias is None else x.data + x.bias.to(x.data.dtype)[:, None, None]
