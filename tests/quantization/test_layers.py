"""Quantized layers are counted by looking at them, whatever library made them."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import import_sdnq
from torch import nn

from fluxrun.quantization.layers import counted, is_quantized, parameter_count


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 32, bias=False))


def test_ordinary_layers():
    found = counted(model())
    parameters = 64 * 128 + 128 + 2 * 128 + 128 * 32
    assert found == {"converted": 0, "of": 2, "bytes_before": 4 * parameters, "bytes": 4 * parameters}
    assert parameter_count(model()) == parameters


def test_torchaos():
    torchao = pytest.importorskip("torchao.quantization")
    made = model()
    torchao.quantize_(made, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    found = counted(made)
    assert (found["converted"], found["of"]) == (2, 2)
    assert found["bytes_before"] == 4 * parameter_count(model())
    assert found["bytes"] < found["bytes_before"] / 3


@pytest.mark.slow
@pytest.mark.parametrize("matmul", [False, True])
@pytest.mark.parametrize("format", ["int8", "uint4", "float8_e4m3fn"])
def test_sdnqs(format, matmul):
    import_sdnq()
    from fluxrun.quantization.libraries import import_library

    import_library("sdnq", "cpu")
    from sdnq import sdnq_post_load_quant

    made = sdnq_post_load_quant(
        model(), weights_dtype=format, use_svd=True, svd_rank=8, use_quantized_matmul=matmul, minimum_allowed_numel=1
    )
    found = counted(made)
    assert (found["converted"], found["of"]) == (2, 2)
    assert found["bytes_before"] == 4 * parameter_count(model())
    assert parameter_count(made) == parameter_count(model())


def test_packed_and_tied():
    tied = model()
    tied.register_parameter("again", tied[0].weight)
    assert parameter_count(tied) == parameter_count(model())
    packed = nn.Linear(64, 128)
    packed.weight = nn.Parameter(torch.zeros(64 * 128 // 2, 1, dtype=torch.uint8), requires_grad=False)
    assert is_quantized(packed)
    assert parameter_count(packed) == 64 * 128 + 128


@pytest.mark.slow
def test_nf4s_are_ordinary_tensors():
    """So that they are shared, moved and counted as any others; bitsandbytes' own CPU code multiplies here."""
    pytest.importorskip("bitsandbytes")
    from fluxrun.quantization.nf4 import Nf4Linear

    linear = nn.Linear(128, 64)
    packed = Nf4Linear(linear, "cpu", "cpu")
    x = torch.randn(3, 128)
    assert (packed(x) - linear(x)).norm() / linear(x).norm() < 0.2
    found = counted(nn.Sequential(packed))
    assert (found["converted"], found["of"]) == (1, 1)
    assert found["bytes"] == 128 * 64 // 2 + 128 * 64 // 64 * 4 + 64 * 4
    assert parameter_count(packed) == parameter_count(linear)
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))
