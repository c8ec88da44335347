"""Attention in float8 through cuDNN: queries, keys, values and output in float8_e4m3, products summed in float32.

torch has no float8 attention of its own, so cuDNN's ``sdpa_fp8`` is called through nvidia-cudnn-frontend. It takes one
scale per tensor. Queries and keys are RMS-normed, which bounds them by their norm's weights: their scale is known
before anything runs. Values get theirs from their largest element, and so does the output, a mean of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from fluxrun.kernels.transformer.fp8_scales import fp8_scales

SOFTMAX_SCALE = 256.0
"""Probabilities are at most 1; scaled by this, small ones stay above float8's underflow."""


class Scales(NamedTuple):
    """float32 scalars on the device. Stored value = value * scale; value = stored value * descale."""

    multipliers: torch.Tensor
    """[3]: the scales of queries, keys and values"""
    descales: torch.Tensor
    """[3]: their reciprocals; the last one is the output's descale too"""


class _Graph(NamedTuple):
    graph: Any
    tensors: dict[str, Any]
    workspace_bytes: int


class CudnnFp8Attention:
    """cuDNN's float8 attention for one block, with the scales that its query and key norms allow."""

    def __init__(self, query_norms: Sequence[torch.Tensor], key_norms: Sequence[torch.Tensor]) -> None:
        self.bounds = torch.tensor(
            [_bound(query_norms), _bound(key_norms)], dtype=torch.float32, device=query_norms[0].device
        )

    def scales(
        self, values: Sequence[torch.Tensor], shared: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> Scales:
        """The scales for these values, [rows, width] each; ``shared`` as in ``fp8_scales``."""
        return Scales(*fp8_scales(values, self.bounds, shared))

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: Scales) -> torch.Tensor:
        """float8 [batch, tokens, heads, size] in, with equal strides, and out; the output's descale is
        ``scales.descales[2]``."""
        import cudnn

        compiled = _graph(tuple(q.shape), tuple(q.stride()), q.device.index or 0)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        workspace = torch.empty(max(1, compiled.workspace_bytes), dtype=torch.uint8, device=q.device)
        amax = torch.empty(2, dtype=torch.float32, device=q.device)
        softmax = _softmax_scales(q.device.index or 0)
        buffers = {
            "q": q, "k": k, "v": v, "o": out,
            "descale_q": scales.descales[0:], "descale_k": scales.descales[1:], "descale_v": scales.descales[2:],
            "scale_s": softmax[0:], "descale_s": softmax[1:], "scale_o": scales.multipliers[2:],
            "amax_s": amax[0:], "amax_o": amax[1:],
        }  # fmt: skip
        handle = _handle(q.device.index or 0)
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(q.device).cuda_stream)
        pointers = {tensor: buffers[name].data_ptr() for name, tensor in compiled.tensors.items()}
        compiled.graph.execute(pointers, workspace.data_ptr(), handle=handle)
        return out


def prepare(shape: tuple[int, int, int, int], device: torch.device) -> None:
    """Have cuDNN's plan for contiguous [batch, tokens, heads, size], which takes it half a second."""
    _, tokens, heads, size = shape
    index = torch.cuda.current_device() if device.index is None else device.index
    _graph(shape, (tokens * heads * size, heads * size, size, 1), index)


def _bound(norms: Sequence[torch.Tensor]) -> float:
    """The largest value that an RMS-normed vector times any of these weights can have, also after rotation."""
    return max(float(weight.float().abs().max()) * math.sqrt(len(weight)) for weight in norms)


@cache
def _handle(device: int) -> Any:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@cache
def _softmax_scales(device: int) -> torch.Tensor:
    return torch.tensor([SOFTMAX_SCALE, 1 / SOFTMAX_SCALE], dtype=torch.float32, device=f"cuda:{device}")


@cache
def _graph(shape: tuple[int, ...], stride: tuple[int, ...], device: int) -> _Graph:
    """cuDNN's execution plan for q, k and v [batch, tokens, heads, size] of these strides, and a contiguous output."""
    import cudnn

    batch, tokens, heads, size = shape
    dim, strides = (batch, heads, tokens, size), (stride[0], stride[2], stride[1], stride[3])
    fp8, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=fp8, intermediate_data_type=fp32, compute_data_type=fp32, handle=_handle(device))
    one = (1, 1, 1, 1)
    tensors = {name: graph.tensor(name=name, dim=dim, stride=strides, data_type=fp8) for name in "qkv"}
    scalars = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    tensors |= {name: graph.tensor(name=name, dim=one, stride=one, data_type=fp32) for name in scalars}
    out, _, amax_s, amax_o = graph.sdpa_fp8(
        **tensors, generate_stats=False, attn_scale=1 / math.sqrt(size), name="sdpa_fp8"
    )
    contiguous = (tokens * heads * size, size, heads * size, 1)
    out.set_output(True).set_dim(dim).set_stride(contiguous).set_data_type(fp8)
    for amax in (amax_s, amax_o):
        amax.set_output(True).set_dim(one).set_stride(one).set_data_type(fp32)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    tensors |= {"o": out, "amax_s": amax_s, "amax_o": amax_o}
    return _Graph(graph, tensors, graph.get_workspace_size())
