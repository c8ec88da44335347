"""Weights are loaded once; shells draw the same picture from the same bytes and never touch the base."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import tiny_folder
from PIL import Image
from torch import nn

from fluxrun.offload.tensors import tensor_bytes
from fluxrun.options.model import Flux2Model
from fluxrun.weights import loading as models
from fluxrun.weights import shells
from fluxrun.weights.store import Base, WeightsKey, WeightStore

PIPELINES = ("klein", "dev")


def tiny(pipeline: str = "klein", **knobs: Any) -> Flux2Model:
    return Flux2Model(weights="random", architecture="tiny", pipeline=pipeline, **knobs)  # type: ignore[arg-type]


def draw(pipeline: Any, prompt: str = "a red circle", **arguments: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"height": 64, "width": 64, "guidance_scale": 1.0, **arguments}
    return pipeline(
        prompt=prompt,
        num_inference_steps=2,
        max_sequence_length=32,
        text_encoder_out_layers=(1, 2, 3),
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        **arguments,
    ).images


@pytest.fixture(scope="module", params=PIPELINES)
def base(request) -> Base:
    return models.load(tiny(request.param), dtype="float32", device="cpu")


def modules(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def state(pipeline: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, module in modules(pipeline).items()
        for key, value in module.state_dict().items()
    }


# --- building and loading -------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_builds_are_bit_identical(pipeline, dtype):
    first, second = (models.load(tiny(pipeline), dtype=dtype, device="cpu") for _ in range(2))
    assert torch.equal(draw(first.pipeline), draw(second.pipeline))
    assert {p.dtype for m in modules(first.pipeline).values() for p in m.parameters()} == {getattr(torch, dtype)}
    assert not any(t.is_meta for m in modules(first.pipeline).values() for t in (*m.parameters(), *m.buffers()))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_random_model_is_initialised_as_described(pipeline):
    made = models.load(tiny(pipeline), dtype="bfloat16", device="cpu").pipeline
    assert (made.vae.bn.running_mean == 0).all()
    assert (made.vae.bn.running_var == 1).all()
    assert made.vae.bn.running_var.dtype == torch.bfloat16  # as from_pretrained leaves it
    for name, parameter in made.transformer.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
    rotary = [b for n, b in made.text_encoder.named_buffers() if n.endswith("inv_freq")]
    assert rotary
    assert all(b.dtype == torch.float32 and b.abs().sum() > 0 for b in rotary)


def test_tied_embedding_is_one_tensor():
    made = models.load(tiny("klein", text_encoder_layers="all"), dtype="float32", device="cpu").pipeline
    assert made.text_encoder.lm_head.weight is made.text_encoder.model.embed_tokens.weight


@pytest.mark.parametrize(("distilled", "expected"), [(None, True), (True, True), (False, False)])
def test_distilled(distilled, expected):
    base = models.load(tiny("klein", distilled=distilled), dtype="float32", device="cpu")
    assert base.pipeline.config.is_distilled is expected
    assert shells.shell(base).config.is_distilled is expected


@pytest.mark.parametrize("size", [64, 128, 256])
def test_tiny_draws_at_every_size_with_a_reference(base, size):
    plain = draw(base.pipeline, height=size, width=size)
    assert plain.shape == (1, 3, size, size)
    assert plain.isfinite().all()
    edited = draw(base.pipeline, height=size, width=size, image=[Image.new("RGB", (64, 64), "red")])
    assert not torch.equal(plain, edited)


def test_prompt_matters(base):
    assert not torch.equal(draw(base.pipeline), draw(base.pipeline, "a blue square"))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_folder_gives_the_same_picture(pipeline):
    loaded = models.load(Flux2Model(path=tiny_folder(pipeline)), dtype="float32", device="cpu")
    built = models.load(tiny(pipeline), dtype="float32", device="cpu")
    torch.testing.assert_close(draw(loaded.pipeline), draw(built.pipeline), atol=1e-4, rtol=0)
    assert loaded.facts["parameters"] == built.facts["parameters"]
    assert loaded.facts["source"] == str(tiny_folder(pipeline).resolve())


def test_dtype_is_the_asked_one_whatever_was_saved():
    """A folder saved in bfloat16 must not come back with mixed dtypes."""
    folder = tiny_folder("klein", distilled=False, dtype="bfloat16")
    base = models.load(Flux2Model(path=folder), dtype="float32", device="cpu")
    assert {p.dtype for m in modules(base.pipeline).values() for p in m.parameters()} == {torch.float32}
    assert base.pipeline.config.is_distilled is False
    draw(shells.shell(base), guidance_scale=4.0)


def test_loading_shows_no_bars(capfd):
    models.load(Flux2Model(path=tiny_folder("klein")), dtype="float32", device="cpu")
    assert "%|" not in capfd.readouterr().err


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("source", ["random", "folder"])
def test_parts(pipeline, source):
    model = tiny(pipeline) if source == "random" else Flux2Model(path=tiny_folder(pipeline))
    found = {}
    for part in ("text", "image", "all"):
        base = models.load(model, dtype="float32", device="cpu", part=part)
        found[part] = {name for name, value in base.pipeline.components.items() if value is not None}
        assert {name for name, value in shells.shell(base).components.items() if value is not None} == found[part]
        assert base.bytes > 0
    assert found["text"] == {"text_encoder", "tokenizer"}
    assert found["image"] == {"transformer", "vae", "scheduler"}
    assert found["all"] == found["text"] | found["image"]


def test_facts(base):
    facts = base.facts
    assert json.loads(json.dumps(facts)) == facts
    components = facts["components"]
    assert facts["parameters"] == sum(c["parameters"] for c in components.values())
    assert base.bytes == facts["bytes"] == sum(c["bytes"] for c in components.values())
    assert components["transformer"]["class"] == "Flux2Transformer2DModel"


def test_progress_names_each_component():
    lines: list[str] = []
    models.load(tiny(), dtype="float32", device="cpu", progress=lines.append)
    assert [line.split()[-1] for line in lines] == list(models.PARTS["all"])


@pytest.mark.parametrize("source", ["random", "folder"])
def test_quantize_is_called_component_by_component(source):
    """Each is quantized before the next one exists, so two unquantized ones never need memory together."""
    events: list[str] = []

    def quantize(component: nn.Module, name: str) -> dict[str, Any]:
        events.append(f"quantized {name}")
        return {"converted": len(list(component.parameters()))}

    def progress(line: str) -> None:
        events.append(f"made {line.rsplit(maxsplit=1)[-1]}")

    model = tiny() if source == "random" else Flux2Model(path=tiny_folder("klein"))
    base = models.load(model, dtype="float32", device="cpu", conversion=models.Conversion(quantize), progress=progress)
    assert [event for event in events if event.split()[1] in ("text_encoder", "transformer", "vae")] == [
        f"{done} {name}" for name in ("transformer", "text_encoder", "vae") for done in ("made", "quantized")
    ]
    assert base.facts["components"]["transformer"]["quantization"]["converted"] > 0


# --- shells ---------------------------------------------------------------------------------------


def test_shell_draws_the_same_picture(base):
    expected = draw(base.pipeline)
    assert torch.equal(draw(shells.shell(base)), expected)
    assert torch.equal(draw(shells.shell(base)), expected)


def test_shell_shares_storage_but_no_object(base):
    shell = shells.shell(base)
    for name, module in modules(base.pipeline).items():
        copy = modules(shell)[name]
        theirs = dict(copy.named_parameters(remove_duplicate=False))
        for key, parameter in module.named_parameters(remove_duplicate=False):
            assert theirs[key] is not parameter
            assert theirs[key].data_ptr() == parameter.data_ptr()
        buffers = dict(copy.named_buffers())
        for key, buffer in module.named_buffers():
            assert buffers[key] is not buffer
            assert buffers[key].data_ptr() != buffer.data_ptr()
        assert not {id(m) for m in module.modules()} & {id(m) for m in copy.modules()}
    assert shell.scheduler is not base.pipeline.scheduler
    assert shell.tokenizer is not base.pipeline.tokenizer
    assert tensor_bytes(t for m in modules(shell).values() for t in m.parameters()) == tensor_bytes(
        t for p in (shell, base.pipeline) for m in modules(p).values() for t in m.parameters()
    )


def test_shell_keeps_ties():
    shell = shells.shell(models.load(tiny("klein", text_encoder_layers="all"), dtype="float32", device="cpu"))
    assert shell.text_encoder.lm_head.weight is shell.text_encoder.model.embed_tokens.weight


def test_base_survives_everything_done_to_a_shell(base):
    before, expected = state(base.pipeline), draw(base.pipeline)
    shell = shells.shell(base)
    shell.to(torch.bfloat16)
    shell.transformer.register_forward_hook(lambda module, inputs, output: pytest.fail("a hook reached the base"))
    shell.transformer.x_embedder = nn.Identity()
    shell.transformer.transformer_blocks[0].attn.processor = None
    shell.transformer.proj_out.weight = nn.Parameter(torch.zeros(1))
    shell.vae.enable_tiling()
    shell.vae.bn.running_var.zero_()
    shell.text_encoder.to("meta")
    shell.tokenizer.pad_token = None
    shell.scheduler.register_to_config(shift=99.0)
    after = state(base.pipeline)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(draw(base.pipeline), expected)
    assert torch.equal(draw(shells.shell(base)), expected)


def _torchao_config(name: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return getattr(quantization, name)()


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_shell_over_torchao_tensors(config):
    from torchao.quantization import quantize_

    def quantize(component: nn.Module, name: str) -> dict[str, Any]:
        if name == "transformer":
            quantize_(component, _torchao_config(config))
        return {}

    plain = models.load(tiny(), dtype="float32", device="cpu")
    base = models.load(tiny(), dtype="float32", device="cpu", conversion=models.Conversion(quantize))
    assert base.bytes < 0.75 * plain.bytes
    shell = shells.shell(base)
    expected = draw(base.pipeline)
    assert torch.equal(draw(shell), expected)
    assert not torch.equal(draw(plain.pipeline), expected)
    tensors = [list(m.transformer.parameters()) for m in (base.pipeline, shell)]
    assert tensor_bytes(tensors[0]) == tensor_bytes(tensors[0] + tensors[1])
    shell.transformer.x_embedder.weight = nn.Parameter(torch.zeros(1))
    assert torch.equal(draw(base.pipeline), expected)


# --- the store ------------------------------------------------------------------------------------


def key(**changes: Any) -> WeightsKey:
    return replace(WeightsKey.of(tiny(), dtype="float32", device="cpu"), **changes)


def test_key_of_a_model():
    assert key().source == "random tiny klein"
    assert WeightsKey.of(tiny("dev"), dtype="float32", device="cpu") != key()
    folder = tiny_folder("klein")
    same = [WeightsKey.of(Flux2Model(path=p), dtype="float32", device="cpu") for p in (folder, folder / "." / "")]
    assert same[0] == same[1]


def test_store_loads_once_and_says_why_again():
    store = WeightStore()
    loads: list[WeightsKey] = []

    def get(wanted: WeightsKey) -> Base:
        def loader() -> Base:
            loads.append(wanted)
            return Base(object(), {}, 0)  # type: ignore[arg-type]

        return store.get(wanted, loader)

    first = get(key())
    assert get(key()) is first
    assert loads == [key()]
    get(key(dtype="bfloat16"))
    get(key(dtype="bfloat16", quantization="fp8", placement="cuda"))
    get(key(part="text"))
    store.keep_only([key(part="text")])
    assert key(part="text") in store
    assert key() not in store
    get(key())
    assert store.reasons == [
        "first load",
        "dtype float32 → bfloat16",
        "quantization none → fp8, placement cpu → cuda",
        "first load",
        "loaded before, freed since",
    ]


def test_failed_load_leaves_no_trace():
    store = WeightStore()
    with pytest.raises(MemoryError):
        store.get(key(), lambda: (_ for _ in ()).throw(MemoryError()))
    assert key() not in store
    assert store.reasons == []


def test_freed_weights_are_gone():
    store = WeightStore()
    store.get(key(), lambda: models.load(tiny(), dtype="float32", device="cpu"))
    shell = shells.shell(store.get(key(), lambda: pytest.fail("loaded twice")))
    gone = weakref.ref(store.get(key(), lambda: pytest.fail("loaded twice")).pipeline.transformer)
    store.clear()
    assert gone() is None
    assert draw(shell).isfinite().all()  # a shell alone keeps what it needs
