"""Offloading: weights are copied to the device when they are needed, never back, and drawn with as if they stayed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import draw, hashes, small

from fluxrun.offload import block_sizes as swap_sizes
from fluxrun.offload import components as offload
from fluxrun.offload import pinning
from fluxrun.pipeline.session_pool import SessionPool


@pytest.fixture(scope="module")
def bench():
    with SessionPool() as pool:
        yield pool


def quantized_layer() -> torch.nn.Module:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    module = torch.nn.Sequential(torch.nn.Linear(64, 32, dtype=torch.bfloat16), torch.nn.BatchNorm1d(32))
    quantize_(module, Float8WeightOnlyConfig(), device="cpu")
    return module.requires_grad_(False)


@pytest.mark.parametrize("kind", ["plain", "torchao", "tied"])
def test_offloading_brings_the_originals_back(kind):
    pytest.importorskip("torchao")
    module = (
        quantized_layer() if kind == "torchao" else torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    )
    if kind == "tied":
        module[1].weight = module[0].weight
    before = [id(tensor) for tensor in (*module.parameters(), *module.buffers())]
    weights = offload.OffloadedWeights(offload.slots(module))
    weights.onload(torch.device("meta"))
    copies = list(module.parameters())
    assert {tensor.device.type for tensor in (*copies, *module.buffers())} == {"meta"}
    assert all(isinstance(tensor, torch.nn.Parameter) for tensor in copies)
    assert (kind == "tied") == (module[-1].weight is module[0].weight)
    weights.offload()
    assert [id(tensor) for tensor in (*module.parameters(), *module.buffers())] == before


@pytest.mark.parametrize("pipeline", ["klein", "dev"])
@pytest.mark.parametrize(
    "overrides",
    [["memory=balanced"], ["memory=group"], ["memory=group", "memory.group_level=block", "memory.blocks_per_group=2"]],
)
def test_the_picture_is_the_same(pipeline, overrides, bench, tmp_path, on_a_cpu):
    model = f"model.pipeline={pipeline}"
    plain = draw(tmp_path / "plain", model, "memory=resident", pool=bench)
    record = draw(tmp_path / "run", model, *overrides, "strict=true", pool=bench)
    assert hashes(record) == hashes(plain)
    if "memory=group" in overrides:
        assert record.options["memory"].facts["groups"] > 0


def test_balanced_copies_once_a_prompt_and_not_once_an_image(bench, tmp_path, on_a_cpu):
    prompts = "prompt=[a red circle, a blue square]"
    record = draw(tmp_path / "run", "memory=balanced", "num_images=3", prompts, "strict=true", pool=bench)
    assert len(record.images) == 6
    # Text encoder and transformer, twice each: images of a prompt that is known need neither to move.
    assert record.options["memory"].facts["components_moved"] == 4
    again = draw(tmp_path / "again", "memory=balanced", "seed=7", prompts, "strict=true", pool=bench)
    assert again.options["memory"].facts["components_moved"] <= 4


@pytest.mark.slow
def test_balanced_beside_regional_and_whole_compile(bench, tmp_path, on_a_cpu):
    """Copies have other addresses every time: nothing is compiled again for that."""
    two = "prompt=[a red circle, a blue square]"
    plain = draw(tmp_path / "plain", "memory=resident", "compile=regional", two, pool=bench)
    record = draw(tmp_path / "run", "memory=balanced", "compile=regional", two, "strict=true", pool=bench)
    facts = record.options["compile"].facts
    assert (facts["graph_breaks"], facts["recompiles"]) == (0, 0)
    assert facts["graphs_run_per_step"] == 3
    assert hashes(record) == hashes(plain)
    whole = draw(tmp_path / "whole", "memory=balanced", "compile=default", two, "strict=true", pool=bench)
    assert (whole.options["compile"].effective, whole.options["compile"].facts["graph_breaks"]) == ("default", 0)
    assert whole.options["compile"].facts["recompiles"] == 0


@pytest.mark.parametrize("overrides", [["memory=balanced"], ["memory=group", "memory.use_stream=false"]])
def test_a_step_cache_beside_offloading(overrides, bench, tmp_path, on_a_cpu):
    pytest.importorskip("cache_dit")
    cached = ("cache=fixed", "steps=8")
    plain = draw(tmp_path / "plain", *cached, "memory=resident", pool=bench)
    record = draw(tmp_path / "run", *cached, *overrides, "strict=true", pool=bench)
    assert record.options["cache"].facts["steps_skipped"] > 0
    assert hashes(record) == hashes(plain)


def test_alternating_offload_with_guidance():
    """Two prompts are encoded before the transformer is called: each component is copied once."""
    import fluxrun

    session = fluxrun.build(small("model.distilled=false"))
    try:
        counters: Counter[str] = Counter()
        alternating = offload.AlternatingOffload(session.pipeline, "cpu", counters)
        assert alternating.onloaded is None
        session.pipeline(
            prompt="a", guidance_scale=4.0, height=64, width=64, num_inference_steps=1,
            max_sequence_length=32, text_encoder_out_layers=(1, 2, 3),
        )  # fmt: skip
        assert (alternating.onloaded, counters["components_moved"]) == ("transformer", 2)
    finally:
        session.close()


def test_pins_hold_what_is_registered_and_let_it_go(monkeypatch):
    registered: set[int] = set()
    monkeypatch.setattr(swap_sizes, "LARGE_BYTES", 1)
    monkeypatch.setattr(pinning, "register", lambda storage: not registered.add(storage.data_ptr()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    class Runtime:
        cudaHostUnregister = staticmethod(registered.discard)

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)

    class Pipeline:
        text_encoder, transformer = None, torch.nn.Linear(8, 8)

    pins = pinning.Pins()
    facts = pins.add(Pipeline)
    assert facts == {"pinned_bytes": 8 * 8 * 4 + 8 * 4}
    assert pins.add(Pipeline) == facts
    assert len(registered) == 2
    del pins
    assert not registered


def test_what_cannot_be_page_locked_is_said(monkeypatch, caplog):
    from types import SimpleNamespace

    from fluxrun.options.memory import Balanced

    pins = SimpleNamespace(add=lambda pipeline: {"pinned_bytes": 0, "not_pinned_bytes": 3 * 2**30})
    context = SimpleNamespace(device="cuda", pins=pins)
    assert Balanced(name="balanced").pinned(None, context)["not_pinned_bytes"] == 3 * 2**30
    assert "memory=balanced: 3.0 GB of the weights could not be page-locked" in caplog.text


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_budget_limits_the_allocator_of_any_cuda_device(device, monkeypatch):
    """torch takes a number here, or a device that has one; plain ``cuda`` has none and is refused."""
    from fluxrun.formatting import GIB
    from fluxrun.options.memory import Resident

    shares = {0: 1.0}

    def number(given):
        assert isinstance(given, int), f"Expected a torch.device with a specified index or an integer, but got:{given}"
        return given

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Device", (), {"total_memory": 80 * GIB}))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda given: shares[number(given)])
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, given: shares.update({number(given): share})
    )
    assert Resident(name="resident").limited(device) == {}
    option = Resident(name="resident", budget_gb=24)
    option.limit(device)
    limit = option.limited(device)["allocator_limit_bytes"]
    assert 20 * GIB < limit < 24 * GIB
