"""Memory estimates and what memory=auto makes of them, on GPUs that are not here."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from helpers import H100, cuda_machine, effective, plan_on

from fluxrun import architectures
from fluxrun.formatting import GIB
from fluxrun.hardware import detection
from fluxrun.hardware.machine import CONTEXT_BYTES, Machine
from fluxrun.offload.block_sizes import BlockSizes, text_encoder_sizes, transformer_sizes
from fluxrun.offload.block_swap import BlockWeights, packed_bytes
from fluxrun.offload.components import slots
from fluxrun.options.memory import allocator_share
from fluxrun.planning.editing import reference_tokens
from fluxrun.planning.plan import Plan
from fluxrun.weights.random_weights import builders, random_text_encoder
from fluxrun.weights.text_encoder import NeededLayers

GIGABYTES = (80, 48, 24, 16, 12)

# dev at 24 GB and below has to stream its weights in fp8 too: 30 GB of transformer do not fit.
CHOSEN = {
    ("flux2_klein_4b", "none"): ("resident", "resident", "resident", "staged", "staged"),
    ("flux2_klein_4b", "fp8"): ("resident", "resident", "resident", "resident", "staged"),
    ("flux2_klein_9b", "none"): ("resident", "resident", "staged", "block_swap", "block_swap"),
    ("flux2_klein_9b", "fp8"): ("resident", "resident", "resident", "staged", "staged"),
    ("flux2_dev", "none"): ("staged", "block_swap", "block_swap", "block_swap", "block_swap"),
    ("flux2_dev", "fp8"): ("resident", "staged", "block_swap", "block_swap", "block_swap"),
}


def card(gigabytes: float, ram: float = 128) -> Machine:
    return cuda_machine(f"{gigabytes} GB", gigabytes, (9, 0), ram=ram, torchvision="0.26")


def planned(machine: Machine, model: str, *overrides: str) -> Any:
    return plan_on(machine, f"model={model}", "model.weights=random", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "quantization"), CHOSEN)
def test_auto_on_cards_of_every_size(model, quantization):
    plans = [planned(card(size), model, f"quantization={quantization}") for size in GIGABYTES]
    assert tuple(effective(plan)["memory"] for plan in plans) == CHOSEN[model, quantization]
    # A budget on a large card plans as a small card does.
    budgets = [
        planned(card(80), model, f"quantization={quantization}", f"memory.budget_gb={size}") for size in GIGABYTES
    ]
    assert tuple(effective(plan)["memory"] for plan in budgets) == CHOSEN[model, quantization]


def test_the_computers_own_memory_counts():
    # dev's weights in bf16, 94 GB, in 64 GB: nothing else fits the GPU, so it is tried, and said.
    plan = planned(card(24, ram=64), "flux2_dev")
    assert effective(plan)["memory"] == "block_swap"
    assert any("97 GB of the computer's own memory, which has 64 GB" in note for note in plan.notes)
    assert not planned(card(24), "flux2_dev").notes
    assert not planned(card(24, ram=0), "flux2_dev").notes  # not known: nothing is said
    needs = ram_needs(planned(card(80), "flux2_dev", "quantization=fp8"))
    assert needs
    # Quantized while it is alone: 60 GB of transformer first, then 30 GB beside the text encoder's 33.
    assert 64 * GIB < needs["group"] == needs["block_swap"] < 70 * GIB


def test_a_budget_beyond_what_is_free_is_not_believed():
    machine = cuda_machine("busy", 80, (9, 0), free=14)
    assert effective(planned(machine, "flux2_klein_4b", "memory.budget_gb=40"))["memory"] == "staged"


def test_working_memory_goes_by_size_and_tiles():
    whole = planned(H100, "flux2_klein_4b", "vae=full")
    assert working_bytes(whole) == pytest.approx(18_643_822_080 - 15_962_000_000, rel=0.01)  # the H100 sweep's peak
    assert working_bytes(planned(H100, "flux2_klein_4b", "vae=tiled")) < working_bytes(whole) / 3
    # In eight tokens more than in pixels: a step of the transformer takes more than a tiled decode.
    assert working_bytes(planned(H100, "flux2_dev", "vae=tiled")) == (4096 + 512) * 6144 * 2 * 22
    assert working_bytes(planned(H100, "flux2_klein_4b", "vae=full", "batch_size=2")) == 2 * working_bytes(whole)


@pytest.mark.parametrize(("model", "measured_gb"), [("flux2_klein_4b", 8.6 - 8.0), ("flux2_dev", 64.7 - 61.4)])
def test_fused_kernels_keep_a_copy(model, measured_gb):
    # One step's peak with and without, in GB (2**30 bytes): benchmarks/results/speed_h200/klein.json and dev.json.
    plain, fused = (working_bytes(planned(H100, model, f"kernels={name}")) for name in ("diffusers", "fused"))
    assert (fused - plain) / GIB == pytest.approx(measured_gb, abs=0.1)
    fp8 = working_bytes(planned(H100, model, "kernels=fused", "quantization=fp8"))
    assert (fp8 - plain) * 2 == fused - plain


def test_blocks_take_more_than_layers_and_sizes_may_be_unknown():
    leaf, block = (
        memory_needs(planned(H100, "flux2_dev", "memory=group", f"memory.group_level={level}"))
        for level in ("leaf", "block")
    )
    assert leaf
    assert block
    assert leaf["group"] <= block["group"]
    plan = planned(H100, "flux2_dev")
    plan.weight_bytes = None
    assert memory_needs(plan) is ram_needs(plan) is None


@pytest.mark.parametrize("name", ["klein_4b", "klein_9b", "dev"])
@pytest.mark.parametrize("quantized", [False, True])
def test_what_is_swapped_is_told_from_the_architecture(name, quantized):
    """Against the modules themselves, on the meta device."""
    found = architectures.architecture(name)
    needed = NeededLayers(architectures.HIDDEN_STATES_READ[found.pipeline])
    with init_empty_weights(include_buffers=False):
        transformer, encoder = builders(found)["transformer"](), random_text_encoder(found, needed)
    needed.trim(encoder)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    of_blocks = halved(transformer.to(torch.bfloat16), blocks if quantized else [])
    total = found.parameters["transformer"] * 2
    told = transformer_sizes(found.transformer, total, 2, 1 if quantized else 2)
    compare(told, blocks, 2 * sum(p.numel() for p in transformer.parameters()) - of_blocks)

    layers = list(encoder.to(torch.bfloat16).get_decoder().layers)
    cut = 2 * sum(p.numel() for p in encoder.parameters())
    told = text_encoder_sizes(found.text, cut, 2, needed.read)
    compare(told, layers, cut - sum(2 * p.numel() for layer in layers for p in layer.parameters()))


def memory_needs(plan: Plan) -> dict[str, int] | None:
    """Bytes on the GPU by memory option."""
    needs = plan.estimate.memory_needs()
    return {name: need.bytes for name, need in needs.items()} if needs else None


def ram_needs(plan: Plan) -> dict[str, int] | None:
    return plan.estimate.ram_needs()


def working_bytes(plan: Plan) -> int:
    return plan.estimate.working_bytes()


def halved(transformer: Any, blocks: list[Any]) -> int:
    """Store the blocks' matrices in one byte per number; returns the bytes that all blocks had before."""
    every = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    before = sum(2 * parameter.numel() for block in every for parameter in block.parameters())
    for linear in (module for block in blocks for module in block.modules() if isinstance(module, torch.nn.Linear)):
        linear.weight = torch.nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return before


def compare(told: BlockSizes, blocks: list[Any], rest: int) -> None:
    real = [BlockWeights(slots(block)) for block in blocks]
    assert told.blocks == tuple(block.bytes for block in real)
    # Norms and scales, some MB, are left out.
    assert told.small == pytest.approx(sum(packed_bytes(block.small) for block in real), abs=2**20)
    assert told.outside == pytest.approx(rest, abs=2**20)


def test_a_folder_of_ones_own_is_recognised(tmp_path):
    from fluxrun.weights.loading import save_tiny

    mine = ("model=local", f"model.path={save_tiny(tmp_path / 'mine', 'dev')}", "model.text_encoder_out_layers=[1,2,3]")
    plan = plan_on(H100, *mine)
    assert plan.model.architecture == "tiny"
    file = tmp_path / "mine" / "transformer" / "config.json"
    file.write_text(file.read_text().replace('"num_single_layers": 2', '"num_single_layers": 3'))
    other = plan_on(H100, *mine, "seed=1")
    assert other.model.architecture is None
    needs = memory_needs(other)
    assert needs
    assert needs["group"] < needs["resident"]


def test_reference_pictures_take_memory():
    def work(*pictures: tuple[int, int]) -> int:
        plan = planned(H100, "flux2_dev", "vae=tiled")
        plan.reference_tokens = reference_tokens([SimpleNamespace(width=w, height=h) for w, h in pictures])
        return working_bytes(plan)

    assert work((1024, 1024)) == (2 * 4096 + 512) * 6144 * 2 * 22
    assert work((4096, 4096)) == work((1024, 1024))  # the pipelines scale it down
    assert work((512, 512), (512, 512)) < work((1024, 1024))


def test_a_number_of_blocks_that_was_asked_for_counts():
    asked = (f"memory.blocks_to_swap={count}" for count in (0, 20, 56, 99))
    needs = [memory_needs(planned(card(24), "flux2_dev", "quantization=fp8", knob)) for knob in asked]
    least = memory_needs(planned(card(24), "flux2_dev", "quantization=fp8"))
    assert least
    swapping = [need["block_swap"] for need in needs if need]
    assert swapping[0] > swapping[1] > swapping[2] == swapping[3] == least["block_swap"]
    assert effective(planned(card(24), "flux2_dev", "quantization=fp8", "memory.blocks_to_swap=0"))["memory"] == "group"


def test_the_allocators_share_leaves_room_for_the_context():
    total = 80 * GIB
    assert allocator_share(24, total) * total == pytest.approx(24 * GIB - CONTEXT_BYTES)
    assert allocator_share(1000, total) == 1.0
    assert allocator_share(0.1, total) == 0.0


def test_a_budget_is_no_unused_knob():
    plan = planned(H100, "flux2_klein_4b", "memory=resident", "memory.budget_gb=24")
    assert not [note for note in plan.notes if "budget" in note]


def test_memory_that_this_process_holds_itself_is_not_lost(monkeypatch):
    """A sweep's second job plans with what the first one's weights will give back, or with the weights themselves."""
    cuda = SimpleNamespace(is_initialized=lambda: True, memory_reserved=lambda index: (index + 1) * GIB)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert detection.own_bytes(1) == 2 * GIB
    cuda.is_initialized = lambda: False
    assert detection.own_bytes(1) == 0
    monkeypatch.delitem(sys.modules, "torch")
    assert detection.own_bytes(0) == 0


def test_a_containers_limit_is_the_computers_memory(monkeypatch, tmp_path):
    whole = detection.ram_bytes()
    (tmp_path / "limit").write_text("1073741824\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(detection, "CGROUP_LIMITS", (str(tmp_path / "none"), str(tmp_path / "absent")))
    assert detection.ram_bytes() >= whole
    monkeypatch.setattr(detection, "CGROUP_LIMITS", (str(tmp_path / "none"), str(tmp_path / "limit")))
    assert detection.ram_bytes() == GIB


def test_a_card_whose_memory_is_taken_is_not_an_empty_one():
    busy = replace(H100, gpus=(replace(H100.gpus[0], free_bytes=5 * GIB),))
    assert effective(planned(busy, "flux2_klein_4b"))["memory"] == "group"
