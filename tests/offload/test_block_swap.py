"""Block swap: blocks share two buffers, find their own weights there, and draw what they would have drawn anyway."""

from __future__ import annotations

import copy
import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import draw, hashes
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import reference
from small_transformer import inputs, transformer

from fluxrun.kernels.transformer.blocks import Projection, fuse
from fluxrun.offload import block_sizes as swap_sizes
from fluxrun.offload import components as offload
from fluxrun.offload.block_sizes import BUFFERS, SPARE_BYTES, evenly_spaced
from fluxrun.offload.block_swap import ALIGNMENT, BlockSwap, BlockWeights, PipelineBlockSwap, packed, packed_bytes
from fluxrun.offload.tensors import tensor_bytes
from fluxrun.pipeline.session_pool import SessionPool

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    with SessionPool() as pool:
        yield pool


@pytest.fixture(autouse=True)
def small_tensors_swap(monkeypatch, on_a_cpu):
    """Real blocks have tensors of hundreds of MB, these have some KB."""
    monkeypatch.setattr(swap_sizes, "LARGE_BYTES", 1024)


class Chain(nn.Module):
    """Blocks one after the other, each from one width to the next, those in ``left_out`` not."""

    def __init__(self, widths: Sequence[int] = (32,) * 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(widths[0], widths[0])
        self.blocks = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.left_out: set[int] = set()
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            if number not in self.left_out:
                x = block(x)
        return x


def swap_of(chain: Chain, *, cyclic: bool = True) -> tuple[BlockSwap, Counter[str]]:
    counters: Counter[str] = Counter()
    return BlockSwap(chain, list(chain.blocks), CPU, counters, cyclic=cyclic), counters


def on_gpu(module: nn.Module) -> int:
    """Bytes of a module's weights where they lie now."""
    return tensor_bytes(slot.tensor for slot in offload.slots(module))


class Encoder(Chain):
    """A text encoder of four layers."""

    def __init__(self) -> None:
        super().__init__((32,) * 5)

    def get_decoder(self) -> Any:
        return SimpleNamespace(layers=self.blocks)


def pipeline_of(encode_prompt: Any = None) -> Any:
    transformer = Chain()
    transformer.transformer_blocks = transformer.blocks[:3]
    transformer.single_transformer_blocks = transformer.blocks[3:]
    return SimpleNamespace(
        vae=nn.Linear(16, 16), transformer=transformer, text_encoder=Encoder(), encode_prompt=encode_prompt
    )


def hooked(chain: Chain) -> bool:
    return any(block._forward_pre_hooks or block._forward_hooks for block in chain.blocks)


def swapping(pipeline: Any, *, room: int = 0, working: int = 0, count: int | None = None) -> PipelineBlockSwap:
    return PipelineBlockSwap(pipeline, "cpu", Counter(), room=room, working=working, count=count)


# -- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", ["klein", "dev"])
@pytest.mark.parametrize("count", [0, 3, None])
def test_the_picture_is_the_same(pipeline, count, bench, tmp_path):
    model = f"model.pipeline={pipeline}"
    given = [] if count is None else [f"memory.blocks_to_swap={count}"]
    plain = draw(tmp_path / "plain", model, "memory=resident", pool=bench)
    record = draw(tmp_path / "run", model, "memory=block_swap", "strict=true", *given, pool=bench)
    assert hashes(record) == hashes(plain)
    facts = record.options["memory"].facts
    # No GPU, no room: all that can be swapped are.
    assert facts["blocks_swapped"] == (facts["blocks"] if count is None else count)
    assert (facts["swapped_bytes"] > 0) == (count != 0)


def test_the_text_encoder_is_onloaded_once_a_prompt(bench, tmp_path):
    options = ("memory=block_swap", "memory.blocks_to_swap=0", "strict=true")
    one = draw(tmp_path / "one", *options, "num_images=1", pool=bench)
    two = draw(tmp_path / "two", *options, "num_images=3", "prompt=[a red circle, a blue square]", pool=bench)
    assert two.options["memory"].facts["blocks_copied"] == 2 * one.options["memory"].facts["blocks_copied"] > 0
    assert hashes(two)[:3] != hashes(two)[3:]


def test_a_step_cache_leaves_blocks_out(bench, tmp_path):
    pytest.importorskip("cache_dit")
    cached = ("cache=fixed", "steps=8")
    plain = draw(tmp_path / "plain", *cached, "memory=resident", pool=bench)
    record = draw(tmp_path / "run", *cached, "memory=block_swap", "strict=true", pool=bench)
    assert record.options["cache"].facts["steps_skipped"] > 0
    assert hashes(record) == hashes(plain)


# -- the pipeline ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("working", [0, 2**20])
def test_what_is_beside_the_transformer(working):
    """The VAE, a reserve, and what a step or the text encoder needs, whichever is more."""
    pipeline, weight, bias = pipeline_of(), 32 * 32 * 4, ALIGNMENT  # of each block; the bias is small and stays
    encoding = on_gpu(pipeline.text_encoder.first) + BUFFERS * weight + 4 * bias
    drawing = on_gpu(pipeline.transformer.first) + 7 * (weight + bias)
    needed = SPARE_BYTES + max(working, encoding) + on_gpu(pipeline.vae) + drawing
    assert len(swapping(pipeline_of(), room=needed, working=working).transformer.swapped) == 0
    assert len(swapping(pipeline_of(), room=needed - 1, working=working).transformer.swapped) > 0


def test_no_more_than_all_blocks_are_swapped():
    assert len(swapping(pipeline_of(), count=99).transformer.swapped) == 7


def test_a_step_ends_with_the_first_blocks_prefetched():
    pipeline = pipeline_of()
    swap = swapping(pipeline).transformer
    pipeline.transformer(torch.randn(2, 32))
    assert [buffer.block for buffer in swap.buffers] == [0, 1]


def test_the_text_encoder_is_onloaded_for_a_prompt_only():
    x = torch.randn(2, 32)
    pipeline = pipeline_of(encode_prompt=lambda prompt, prompt_embeds=None: pipeline.text_encoder(x))
    counters = swapping(pipeline, count=0).transformer.counters
    for copied in (4, 8):
        pipeline.encode_prompt("a red circle")
        assert counters["blocks_copied"] == copied
    pipeline.encode_prompt(None, prompt_embeds=x)
    assert counters["blocks_copied"] == 8


@pytest.mark.parametrize("stage", ["onload", "encoding"])
def test_the_text_encoder_is_offloaded_after_an_error(stage, monkeypatch):
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    pipeline = pipeline_of(encode_prompt=fail)
    before = list(pipeline.text_encoder.parameters())
    swapping(pipeline, count=0)
    if stage == "onload":
        monkeypatch.setattr(BlockSwap, "prefetch", fail)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.encode_prompt("a red circle")
    assert all(now is then for now, then in zip(pipeline.text_encoder.parameters(), before, strict=True))
    assert not hooked(pipeline.text_encoder)


# -- one module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(8))
@pytest.mark.parametrize("cyclic", [True, False])
def test_every_block_finds_its_weights(count, cyclic):
    chain, x = Chain(), torch.randn(2, 32)
    wanted = chain(x)
    swap, _ = swap_of(chain, cyclic=cyclic)
    swap.onload(count)
    addresses = {block.weight.data_ptr() for block in chain.blocks}
    assert len(addresses) == 7 - count + min(BUFFERS, count)
    for _ in range(3):
        assert torch.equal(chain(x), wanted)
    swap.offload()
    assert torch.equal(chain(x), wanted)


@pytest.mark.parametrize("left_out", [{0}, {3}, {0, 1, 2, 3, 4}, {6}])
def test_blocks_may_be_left_out(left_out):
    chain, x = Chain(), torch.randn(2, 32)
    whole = chain(x)
    chain.left_out = left_out
    partly = chain(x)
    swap, _ = swap_of(chain)
    swap.onload(7)
    for _ in range(3):
        assert torch.equal(chain(x), partly)
        chain.left_out = set()
        assert torch.equal(chain(x), whole)
        chain.left_out = left_out


@pytest.mark.parametrize("count", range(1, 8))
def test_blocks_of_unequal_sizes(count):
    """They take as many bytes as was said beforehand."""
    chain, x = Chain((32, 24, 40, 96, 48, 32, 20, 64)), torch.randn(2, 32)
    wanted = chain(x)
    swap, _ = swap_of(chain)
    swap.onload(count)
    assert on_gpu(chain) == swap.sizes.on_gpu(count)
    for _ in range(2):
        assert torch.equal(chain(x), wanted)


@pytest.mark.parametrize("count", [3, 4, 7])
@pytest.mark.parametrize("cyclic", [True, False])
def test_the_block_that_follows_is_prefetched(count, cyclic):
    """As soon as its buffer is free: when it is called, there would be nothing to compute meanwhile."""
    chain, x = Chain(), torch.randn(2, 32)
    swap, _ = swap_of(chain, cyclic=cyclic)
    swap.onload(count)
    for _ in range(2):
        for number, position in enumerate(evenly_spaced(count, 7)):
            chain.blocks[position](x)
            last = number + BUFFERS >= count
            follows = number + BUFFERS if not last else number % BUFFERS if cyclic else number
            weight, buffer = swap.swapped[follows].large[0], swap.buffers[number % BUFFERS]
            assert torch.equal(buffer.memory.view(weight.dtype).view(weight.shape), weight)


@pytest.mark.parametrize("count", range(1, BUFFERS + 1))
@pytest.mark.parametrize("cyclic", [True, False])
def test_a_block_with_a_buffer_of_its_own_is_copied_once(count, cyclic):
    chain, x = Chain(), torch.randn(2, 32)
    swap, counters = swap_of(chain, cyclic=cyclic)
    swap.onload(count)
    for _ in range(3):
        chain(x)
    assert counters["blocks_copied"] == count


def test_a_step_copies_each_swapped_block_once():
    chain, x = Chain(), torch.randn(2, 32)
    swap, counters = swap_of(chain)
    swap.onload(4)
    chain(x)
    before = counters["blocks_copied"]
    for _ in range(5):
        chain(x)
    assert counters["blocks_copied"] - before == 5 * 4
    assert counters["bytes_copied"] == counters["blocks_copied"] * swap.swapped[0].bytes


def test_originals_come_back():
    chain = Chain()
    before = [id(parameter) for parameter in chain.parameters()]
    swap, _ = swap_of(chain, cyclic=False)
    swap.onload(7)
    assert not set(before) & {id(parameter) for parameter in chain.parameters()}
    assert all(isinstance(tensor, nn.Parameter) for tensor in chain.parameters())
    swap.offload()
    assert [id(parameter) for parameter in chain.parameters()] == before
    assert not hooked(chain)


def test_copies_are_freed():
    chain = Chain()
    swap, _ = swap_of(chain, cyclic=False)
    swap.onload(4)
    tensors = [*chain.parameters(), *(buffer.memory for buffer in swap.buffers)]
    tensors += [copied for block in swap.blocks for copied in block.copies]
    copies = [weakref.ref(tensor) for tensor in tensors]
    del tensors
    swap.offload()
    assert not any(tensor() is not None for tensor in copies)


def test_quantized_weights_stay_quantized():
    pytest.importorskip("torchao")
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    chain, x = Chain((64,) * 8).to(torch.bfloat16), torch.randn(2, 64, dtype=torch.bfloat16)
    quantize_(chain.blocks, Float8WeightOnlyConfig(set_inductor_config=False))
    wanted = chain(x)
    swap, _ = swap_of(chain)
    swap.onload(5)
    assert {type(block.weight.data) for block in chain.blocks} == {type(swap.blocks[0].originals[0].tensor.data)}
    assert all(isinstance(tensor, nn.Parameter) for tensor in chain.parameters())
    for _ in range(2):
        assert torch.equal(chain(x), wanted)


def test_as_few_as_fit():
    swap, _ = swap_of(Chain())
    whole, each = swap.sizes.on_gpu(0), swap.blocks[0].bytes
    assert swap.sizes.fewest(whole) == 0
    # With two buffers, swapping one or two saves nothing.
    assert swap.sizes.fewest(whole - 1) == 3
    assert swap.sizes.fewest(whole - each) == 3
    assert swap.sizes.fewest(whole - each - 1) == 4
    assert swap.sizes.fewest(0) == 7


def test_tensors_are_aligned():
    tensors = [torch.zeros(300, dtype=torch.uint8), torch.zeros(5), torch.zeros(1)]
    memory = torch.empty(packed_bytes(tensors), dtype=torch.uint8)
    starts = [tensor.data_ptr() - memory.data_ptr() for tensor in packed(tensors, memory)]
    assert (starts, len(memory)) == ([0, 512, 768], 1024)


@pytest.mark.parametrize(("count", "total"), [(0, 5), (1, 5), (2, 5), (5, 5), (7, 56), (55, 56)])
def test_evenly_spaced(count, total):
    chosen = evenly_spaced(count, total)
    assert len(set(chosen)) == count
    assert all(0 <= position < total for position in chosen)
    gaps = {after - before for before, after in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1


# -- beside fused kernels -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 2, 5])
@pytest.mark.parametrize("large", [1024, 8192])
def test_fused_kernels_read_the_buffers(count, large, monkeypatch):
    """Also where query, key and value are too small to be swapped (4.6 KB here, the feed-forward's weights 28 KB)."""
    monkeypatch.setattr(swap_sizes, "LARGE_BYTES", large)
    model = transformer(torch.bfloat16)
    arguments = inputs(torch.bfloat16)
    plain = copy.deepcopy(model)(**arguments)[0]
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    swap = BlockSwap(model, blocks, CPU, Counter(), cyclic=True)
    swap.onload(count)
    assert swap.blocks[0].small
    counters: Counter[str] = Counter()
    fuse(model, reference, counters, in_place=True)
    for calls in (1, 2):
        assert torch.equal(model(**arguments)[0], plain)
        assert counters["fused_block_calls"] == 5 * calls


@pytest.mark.parametrize("large", [1, 2**20])
def test_fused_kernels_find_quantized_weights_side_by_side(large, monkeypatch):
    """Whether swapped or too small, and though the layers' scales come in between."""
    pytest.importorskip("torchao")
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    monkeypatch.setattr(swap_sizes, "LARGE_BYTES", large)
    attention = nn.Sequential(*(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in "qkv"))
    quantize_(attention.requires_grad_(False), Float8WeightOnlyConfig(set_inductor_config=False))
    block = BlockWeights(list(offload.slots(attention)))
    block.use(torch.empty(block.bytes, dtype=torch.uint8))
    Projection(*attention, in_place=True)


def test_fused_kernels_refuse_to_copy_what_changes():
    with pytest.raises(ValueError, match="side by side"):
        fuse(transformer(torch.float32), reference, Counter(), in_place=True)
