"""The fused blocks against diffusers' own, on the CPU: the kernels are stood in for by the operations they fuse."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import reference
from small_transformer import inputs, transformer

from fluxrun.compilation.cuda_graphs import GraphedForward
from fluxrun.kernels.transformer.blocks import Projection, fuse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_fused_blocks_compute_what_diffusers_blocks_compute(dtype):
    plain = transformer(dtype)
    fused, counters = copy.deepcopy(plain), Counter()
    assert fuse(fused, reference, counters) == {"double_blocks": 2, "single_blocks": 3}
    arguments = inputs(dtype)
    assert torch.equal(plain(**arguments)[0], fused(**arguments)[0])
    assert counters["fused_block_calls"] == 5


@torch.no_grad()
def test_fused_blocks_quantize_what_torchao_quantized():
    pytest.importorskip("torchao")
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    plain = transformer(torch.bfloat16)
    fused = copy.deepcopy(plain)
    config = Float8WeightOnlyConfig(set_inductor_config=False)
    layers = [m for n, m in fused.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks" in n]
    quantize_(fused, config, filter_fn=lambda module, _: module in layers)
    projection = Projection(fused.transformer_blocks[0].attn.to_q, fused.transformer_blocks[0].attn.to_k)
    assert projection.quantized
    assert projection.weight.dtype == torch.float8_e4m3fn
    rows = torch.randn(32, 48, dtype=torch.bfloat16)
    wanted = torch.cat([plain.transformer_blocks[0].attn.to_q(rows), plain.transformer_blocks[0].attn.to_k(rows)], 1)
    given = reference.quantized(rows)
    product = (given.data.float() * given.scale) @ (projection.weight.float() * projection.scale.T).T
    assert (product - wanted).norm() / wanted.norm() < 0.06


def test_layers_the_kernels_cannot_stand_in_for_are_refused_before_anything_changed():
    model = transformer(torch.float32)
    model.single_transformer_blocks[2].attn.to_out = nn.Linear(144, 48, bias=True)
    with pytest.raises(ValueError, match="without bias"):
        fuse(model, reference, Counter())
    assert not any("forward" in vars(block) for block in model.transformer_blocks)


@torch.no_grad()
def test_call_arguments_the_kernels_do_not_cover_are_refused():
    model = transformer(torch.float32)
    fuse(model, reference, Counter())
    with pytest.raises(NotImplementedError, match="kv_cache_mode"):
        model(**inputs(torch.float32), joint_attention_kwargs={"kv_cache_mode": "extract"})


@torch.no_grad()
def test_a_graphed_forward_on_a_cpu_is_the_forward_itself():
    model = transformer(torch.float32)
    graphed = GraphedForward(model.forward)
    arguments = inputs(torch.float32)
    for _ in range(3):
        assert torch.equal(graphed(**arguments)[0], model(**arguments)[0])
    assert (graphed.graphs, graphed.replays) == (0, 0)
