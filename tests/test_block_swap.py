"""Block swap: blocks share two places, are there when they are called, and draw what they would have drawn anyway."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import draw, hashes
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
import reference
from small_transformer import inputs, transformer

from fluxrun import offload
from fluxrun.block_swap import Stack
from fluxrun.kernels.blocks import fuse
from fluxrun.swap_sizes import PLACES, spread
from fluxrun.workbench import Workbench

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    with Workbench() as workbench:
        yield workbench


@pytest.fixture(autouse=True)
def small_tensors_swap(monkeypatch, on_a_cpu):
    """Real blocks have tensors of hundreds of MB, these have some KB."""
    monkeypatch.setattr(offload, "PINNED_FROM_BYTES", 1024)


class Chain(nn.Module):
    """Blocks one after the other, those in ``left_out`` not."""

    def __init__(self, blocks: int = 7, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.left_out: set[int] = set()
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            if number not in self.left_out:
                x = block(x)
        return x


def stack_of(chain: Chain, *, endless: bool = True) -> tuple[Stack, Counter[str]]:
    counters: Counter[str] = Counter()
    return Stack(chain, list(chain.blocks), CPU, counters, endless=endless), counters


# -- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", ["klein", "dev"])
@pytest.mark.parametrize("count", [0, 3, None])
def test_the_picture_is_the_same(pipeline, count, bench, tmp_path):
    model = f"model.pipeline={pipeline}"
    given = [] if count is None else [f"memory.blocks_to_swap={count}"]
    plain = draw(tmp_path / "plain", model, "memory=resident", workbench=bench)
    record = draw(tmp_path / "run", model, "memory=block_swap", "strict=true", *given, workbench=bench)
    assert hashes(record) == hashes(plain)
    facts = record.options["memory"].facts
    # No GPU, no room: all that can be swapped are.
    assert facts["blocks_swapped"] == (facts["blocks"] if count is None else count)
    assert (facts["swapped_bytes"] > 0) == (count != 0)


def test_the_text_encoder_comes_once_a_prompt(bench, tmp_path):
    swap = ("memory=block_swap", "memory.blocks_to_swap=0", "strict=true")
    one = draw(tmp_path / "one", *swap, "num_images=3", workbench=bench)
    two = draw(tmp_path / "two", *swap, "num_images=3", "prompt=[a red circle, a blue square]", workbench=bench)
    assert two.options["memory"].facts["blocks_copied"] == 2 * one.options["memory"].facts["blocks_copied"] > 0
    assert hashes(two)[:3] != hashes(two)[3:]


def test_a_step_cache_leaves_blocks_out(bench, tmp_path):
    pytest.importorskip("cache_dit")
    cached = ("cache=fixed", "steps=8")
    plain = draw(tmp_path / "plain", *cached, "memory=resident", workbench=bench)
    record = draw(tmp_path / "run", *cached, "memory=block_swap", "strict=true", workbench=bench)
    assert record.options["cache"].facts["steps_skipped"] > 0
    assert hashes(record) == hashes(plain)


# -- the stack ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(8))
@pytest.mark.parametrize("endless", [True, False])
def test_every_block_finds_its_weights(count, endless):
    chain, x = Chain(), torch.randn(2, 32)
    wanted = chain(x)
    stack, _ = stack_of(chain, endless=endless)
    stack.enter(count)
    addresses = {block.weight.data_ptr() for block in chain.blocks}
    assert len(addresses) == 7 - count + min(PLACES, count)
    for _ in range(3):
        assert torch.equal(chain(x), wanted)
    stack.leave()
    assert torch.equal(chain(x), wanted)


@pytest.mark.parametrize("left_out", [{0}, {3}, {0, 1, 2, 3, 4}, {6}])
def test_blocks_may_be_left_out(left_out):
    chain, x = Chain(), torch.randn(2, 32)
    whole = chain(x)
    chain.left_out = left_out
    partly = chain(x)
    stack, _ = stack_of(chain)
    stack.enter(7)
    for _ in range(3):
        assert torch.equal(chain(x), partly)
        chain.left_out = set()
        assert torch.equal(chain(x), whole)
        chain.left_out = left_out


def test_a_step_copies_each_swapped_block_once():
    chain, x = Chain(), torch.randn(2, 32)
    stack, counters = stack_of(chain)
    stack.enter(4)
    chain(x)
    before = counters["blocks_copied"]
    for _ in range(5):
        chain(x)
    assert counters["blocks_copied"] - before == 5 * 4
    assert counters["bytes_copied"] == counters["blocks_copied"] * stack.away[0].bytes


def test_originals_come_back():
    chain = Chain()
    before = [id(parameter) for parameter in chain.parameters()]
    stack, _ = stack_of(chain, endless=False)
    stack.enter(7)
    assert not set(before) & {id(parameter) for parameter in chain.parameters()}
    stack.leave()
    assert [id(parameter) for parameter in chain.parameters()] == before
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in chain.blocks)


def test_quantized_weights_stay_quantized():
    pytest.importorskip("torchao")
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    chain, x = Chain(width=64).to(torch.bfloat16), torch.randn(2, 64, dtype=torch.bfloat16)
    quantize_(chain.blocks, Float8WeightOnlyConfig(set_inductor_config=False))
    wanted = chain(x)
    stack, _ = stack_of(chain)
    stack.enter(5)
    assert {type(block.weight.data) for block in chain.blocks} == {type(stack.blocks[0].home[0][2].data)}
    for _ in range(2):
        assert torch.equal(chain(x), wanted)


def test_as_few_as_fit():
    stack, _ = stack_of(Chain())
    whole, each = stack.sizes.on_gpu(0), stack.blocks[0].bytes
    assert stack.sizes.fewest(whole) == 0
    # With two places, swapping one or two saves nothing.
    assert stack.sizes.fewest(whole - 1) == 3
    assert stack.sizes.fewest(whole - each) == 3
    assert stack.sizes.fewest(whole - each - 1) == 4
    assert stack.sizes.fewest(0) == 7


@pytest.mark.parametrize(("count", "total"), [(0, 5), (1, 5), (2, 5), (5, 5), (7, 56), (55, 56)])
def test_evenly_spread(count, total):
    chosen = spread(count, total)
    assert len(set(chosen)) == count
    assert all(0 <= position < total for position in chosen)
    gaps = {after - before for before, after in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1


# -- beside fused kernels -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 2, 5])
@pytest.mark.parametrize("large", [1024, 8192])
def test_fused_kernels_read_the_places(count, large, monkeypatch):
    """Also where query, key and value are too small to be swapped (4.6 KB here, the feed-forward's weights 28 KB)."""
    monkeypatch.setattr(offload, "PINNED_FROM_BYTES", large)
    model = transformer(torch.bfloat16)
    arguments = inputs(torch.bfloat16)
    plain = copy.deepcopy(model)(**arguments)[0]
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    stack = Stack(model, blocks, CPU, Counter(), endless=True)
    stack.enter(count)
    assert stack.blocks[0].small
    counters: Counter[str] = Counter()
    fuse(model, reference, counters, in_place=True)
    for calls in (1, 2):
        assert torch.equal(model(**arguments)[0], plain)
        assert counters["fused_block_calls"] == 5 * calls


def test_fused_kernels_refuse_to_copy_what_changes():
    with pytest.raises(ValueError, match="side by side"):
        fuse(transformer(torch.float32), reference, Counter(), in_place=True)
