"""cublasLt's algorithms for one matmul, through the library that torch has loaded: nothing to install or compile.

Not through nvmath-python: its ``Matmul`` makes each new operand wait for the last call's event, which no CUDA graph can
record, and its plain bindings, "experimental" by their manual, make the same calls as these.
"""

from __future__ import annotations

import ctypes as c
import os
from functools import cache, partial
from typing import Any, NamedTuple

import torch

ALIGNMENT = 256
"""Bytes: where operands begin, as the heuristics take for granted; torch's allocator begins blocks at 512."""

WORKSPACE_BYTES = 64 * 2**20
"""The most that an algorithm may want beside its operands."""

# Of cublasLt's and CUDA's headers.
BFLOAT16, FLOAT8, FLOAT32, COMPUTE_IN_FLOAT32 = 14, 28, 0, 68
TRANSPOSE_A, SCALES_A, SCALES_B, FAST_ACCUMULATION, SCALE_MODE_A, SCALE_MODE_B = 3, 17, 18, 25, 31, 32
TRANSPOSED, ONE_SCALE_A_ROW, MOST_WORKSPACE = 1, 3, 1

POINTER, SIZE = c.c_void_p, c.c_size_t
Value = c.c_int8 | c.c_int32 | c.c_uint64 | c.c_void_p


class _Algorithm(c.Structure):
    """cublasLtMatmulAlgo_t: opaque, and the same for one version of the library, so that it can be kept."""

    _fields_ = (("data", c.c_uint64 * 8),)


class _Result(c.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", _Algorithm), ("workspace", SIZE), ("status", c.c_int), ("waves", c.c_float),
        ("reserved", c.c_int * 4),
    )  # fmt: skip


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (POINTER,),
    "cublasLtMatmulDescCreate": (POINTER, c.c_int, c.c_int),
    "cublasLtMatmulDescSetAttribute": (POINTER, c.c_int, POINTER, SIZE),
    "cublasLtMatrixLayoutCreate": (POINTER, c.c_int, c.c_uint64, c.c_uint64, c.c_int64),
    "cublasLtMatmulPreferenceCreate": (POINTER,),
    "cublasLtMatmulPreferenceSetAttribute": (POINTER, c.c_int, POINTER, SIZE),
    "cublasLtMatmulAlgoGetHeuristic": (*[POINTER] * 7, c.c_int, POINTER, POINTER),
    "cublasLtMatmulAlgoCheck": (POINTER,) * 8,
    "cublasLtMatmul": (*[POINTER] * 14, SIZE, POINTER),
}
"""Each returns a status, 0 for success."""


class CublasError(RuntimeError):
    """A call that did not return success."""


class Algorithm(NamedTuple):
    """One way to compute a matmul."""

    data: bytes
    """cublasLtMatmulAlgo_t"""
    workspace: int
    """Bytes it wants beside its operands."""


class Operands(NamedTuple):
    """Of ``rows @ weight.T``: [m, k] and [n, k] -> [m, n]."""

    rows: torch.Tensor
    weight: torch.Tensor
    dtype: torch.dtype
    """Of the result."""
    scales: tuple[torch.Tensor, torch.Tensor] | None = None
    """Of float8 operands, float32: the rows' [m, 1] and the weight's [1, n]."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """m, k and n."""
        return self.rows.shape[0], self.rows.shape[1], self.weight.shape[0]


class Problem:
    """``Operands`` of one shape, in bfloat16 or row-wise scaled float8, summed in float32 and stored as bfloat16."""

    def __init__(self, operands: Operands) -> None:
        device, (m, k, n) = operands.rows.device, operands.shape
        self._lt, self._handle = _library(), _handle(device.index or 0)
        self._shape = (m, n)
        self._description = self._made("cublasLtMatmulDescCreate", COMPUTE_IN_FLOAT32, FLOAT32)
        self._set("cublasLtMatmulDescSetAttribute", self._description, TRANSPOSE_A, c.c_int32(TRANSPOSED))
        if operands.scales is not None:
            set_attribute = partial(self._set, "cublasLtMatmulDescSetAttribute", self._description)
            set_attribute(FAST_ACCUMULATION, c.c_int8(1))
            set_attribute(SCALE_MODE_A, c.c_int32(ONE_SCALE_A_ROW))
            set_attribute(SCALE_MODE_B, c.c_int32(ONE_SCALE_A_ROW))
            self._point_to(operands.scales)
        # Columns first, as cuBLAS counts: the transposed result is the weight times the transposed rows.
        given = BFLOAT16 if operands.scales is None else FLOAT8
        self._layouts = [
            self._made("cublasLtMatrixLayoutCreate", kind, first, second, first)
            for kind, first, second in ((given, k, n), (given, k, m), (BFLOAT16, n, m), (BFLOAT16, n, m))
        ]
        self._one, self._zero = c.c_float(1), c.c_float(0)

    @staticmethod
    def suits(operands: Operands) -> bool:
        """Whether such operands can be multiplied here."""
        given = torch.bfloat16 if operands.scales is None else torch.float8_e4m3fn
        parts = (operands.rows, operands.weight)
        return operands.dtype == torch.bfloat16 and all(
            part.is_cuda and part.dtype == given and part.is_contiguous() and part.data_ptr() % ALIGNMENT == 0
            for part in parts
        )

    def algorithms(self, most: int) -> list[Algorithm]:
        """The library's own suggestions, the best first."""
        preference = self._made("cublasLtMatmulPreferenceCreate")
        self._set("cublasLtMatmulPreferenceSetAttribute", preference, MOST_WORKSPACE, c.c_uint64(WORKSPACE_BYTES))
        found, count = (_Result * most)(), c.c_int()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self._handle, self._description, *self._layouts, preference, most, found,
            c.byref(count),
        )  # fmt: skip
        return [_kept(result) for result in found[: count.value] if result.status == 0]

    def checked(self, data: bytes) -> Algorithm:
        """An algorithm that was kept. Raises CublasError when the library would not take it for this matmul."""
        result, algorithm = _Result(), _Algorithm.from_buffer_copy(data)
        arguments = (self._handle, self._description, *self._layouts, c.byref(algorithm), c.byref(result))
        self._call("cublasLtMatmulAlgoCheck", *arguments)
        if result.status or result.workspace > WORKSPACE_BYTES:
            raise CublasError(f"a kept algorithm is not for this matmul (status {result.status})")
        return Algorithm(data, int(result.workspace))

    def multiply(self, operands: Operands, algorithm: Algorithm) -> torch.Tensor:
        """On the current stream, also while it is recorded. Raises CublasError."""
        rows, weight = operands.rows, operands.weight
        out = torch.empty(self._shape, dtype=operands.dtype, device=rows.device)
        if operands.scales is not None:
            self._point_to(operands.scales)
        workspace = torch.empty(max(1, algorithm.workspace), dtype=torch.uint8, device=rows.device)
        a, b, _, d = self._layouts
        self._call(
            "cublasLtMatmul", self._handle, self._description, c.byref(self._one), weight.data_ptr(), a,
            rows.data_ptr(), b, c.byref(self._zero), out.data_ptr(), d, out.data_ptr(), d,
            c.byref(_Algorithm.from_buffer_copy(algorithm.data)), workspace.data_ptr(), algorithm.workspace,
            torch.cuda.current_stream(rows.device).cuda_stream,
        )  # fmt: skip
        return out

    def _point_to(self, scales: tuple[torch.Tensor, torch.Tensor]) -> None:
        """The weight is cuBLAS's first operand."""
        rows, weight = scales
        for attribute, scale in ((SCALES_A, weight), (SCALES_B, rows)):
            self._set("cublasLtMatmulDescSetAttribute", self._description, attribute, POINTER(scale.data_ptr()))

    def _made(self, name: str, *arguments: Any) -> c.c_void_p:
        made = c.c_void_p()
        self._call(name, c.byref(made), *arguments)
        return made

    def _set(self, name: str, of: c.c_void_p, attribute: int, value: Value) -> None:
        self._call(name, of, attribute, c.byref(value), c.sizeof(value))

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._lt, name)(*arguments):
            raise CublasError(f"{name} returned {status}")


def version() -> int:
    """The library's version. Raises OSError where torch has loaded none."""
    return int(_library().cublasLtGetVersion())


def _kept(result: _Result) -> Algorithm:
    return Algorithm(bytes(result.algorithm), int(result.workspace))


@cache
def _library() -> c.CDLL:
    """The cublasLt that torch works with; no other one is loaded."""
    if torch.version.cuda is None:
        raise OSError("torch is a build without CUDA")
    name = f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}"
    library = c.CDLL(name, mode=os.RTLD_NOW | getattr(os, "RTLD_NOLOAD", 0))
    for function, arguments in SIGNATURES.items():
        getattr(library, function).argtypes = arguments
    library.cublasLtGetVersion.restype = SIZE
    return library


@cache
def _handle(device: int) -> c.c_void_p:
    """One for each device, for as long as the process lives."""
    handle = c.c_void_p()
    with torch.cuda.device(device):
        if status := _library().cublasLtCreate(c.byref(handle)):
            raise CublasError(f"cublasLtCreate returned {status}")
    return handle
