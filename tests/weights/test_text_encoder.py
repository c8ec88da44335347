"""The text encoder is cut behind the last layer read: smaller, without a head, with the same embeddings to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import tiny_folder
from torch.utils._python_dispatch import TorchDispatchMode

from fluxrun.compilation.cuda_graphs import with_explicit_mask
from fluxrun.errors import ConfigError
from fluxrun.options.model import Flux2Model
from fluxrun.weights import loading as models
from fluxrun.weights import shells
from fluxrun.weights.store import Base, WeightsKey

PIPELINES = ("klein", "dev")
TINY_LAYERS = 4


def model(pipeline: str, source: str, **knobs: Any) -> Flux2Model:
    if source == "folder":
        return Flux2Model(path=tiny_folder(pipeline), **knobs)
    return Flux2Model(weights="random", architecture="tiny", pipeline=pipeline, **knobs)  # type: ignore[arg-type]


def loaded(pipeline: str, source: str, layers: str, read: tuple[int, ...], dtype: str = "float32") -> Base:
    option = model(pipeline, source, text_encoder_layers=layers, text_encoder_out_layers=read)
    return models.load(option, dtype=dtype, device="cpu")


def embedding(pipeline: Any, read: tuple[int, ...]) -> torch.Tensor:
    embeds, _ = pipeline.encode_prompt(
        "a red circle left of a blue square", device="cpu", max_sequence_length=48, text_encoder_out_layers=read
    )
    return embeds


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("source", ["random", "folder"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("read", [(1, 2, 3), (1, 2), (0, 1), (2, 4), (1, -1)])
def test_embeddings_are_the_same_to_the_bit(pipeline, source, dtype, read):
    whole, needed = (loaded(pipeline, source, layers, read, dtype) for layers in ("all", "needed"))
    expected = embedding(whole.pipeline, read)
    assert torch.equal(embedding(needed.pipeline, read), expected)
    assert torch.equal(embedding(shells.shell(needed), read), expected)
    kept = max(read) if max(read) < TINY_LAYERS and min(read) >= 0 else TINY_LAYERS
    facts = needed.facts["components"]["text_encoder"]
    assert (facts["layers"], facts["layers_of"]) == (kept, TINY_LAYERS)
    assert len(needed.pipeline.text_encoder.get_decoder().layers) == kept
    assert facts["bytes_saved"] == whole.bytes - needed.bytes
    if kept < TINY_LAYERS or pipeline == "dev":  # klein's head is its embedding: leaving it out saves time only
        assert needed.bytes < whole.bytes


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_picture_is_plain_diffusers(pipeline):
    from diffusers import Flux2KleinPipeline, Flux2Pipeline

    cls = {"klein": Flux2KleinPipeline, "dev": Flux2Pipeline}[pipeline]
    plain = cls.from_pretrained(tiny_folder(pipeline), dtype=torch.float32)
    ours = shells.shell(loaded(pipeline, "folder", "needed", (1, 2, 3)))
    assert type(ours) is cls
    assert type(ours.text_encoder) is type(plain.text_encoder)
    pictures = []
    for drawing in (plain, ours):
        drawing.set_progress_bar_config(disable=True)
        pictures.append(
            drawing(
                prompt="a red circle", height=64, width=64, num_inference_steps=2, guidance_scale=1.0,
                max_sequence_length=48, text_encoder_out_layers=(1, 2, 3), output_type="pt",
                generator=torch.Generator().manual_seed(0),
            ).images
        )  # fmt: skip
    assert torch.equal(*pictures)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_nothing_of_the_head_or_of_the_layers_behind_runs(pipeline):
    made = loaded(pipeline, "folder", "needed", (1, 2)).pipeline
    whole = loaded(pipeline, "folder", "all", (1, 2)).pipeline
    ran: dict[str, int] = {}
    for name, encoder in (("needed", made.text_encoder), ("all", whole.text_encoder)):
        for module in encoder.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda *_, name=name: ran.update({name: ran.get(name, 0) + 1}))
    embedding(made, (1, 2))
    embedding(whole, (1, 2))
    per_layer = 7  # q, k, v, o, gate, up, down
    assert ran == {"needed": 2 * per_layer, "all": TINY_LAYERS * per_layer + 1}


def test_all_keeps_the_head_for_generating():
    made = loaded("dev", "folder", "all", (1, 2, 3))
    assert "layers" not in made.facts["components"]["text_encoder"]
    tokens = made.pipeline.text_encoder.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
    assert tokens.shape[1] > 2


def test_loading_says_nothing_about_layers_left_out(capfd, caplog):
    loaded("klein", "folder", "needed", (1, 2))
    out, err = capfd.readouterr()
    assert "layers.3" not in out + err + caplog.text


def test_a_checkpoint_that_lacks_a_layer_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = models.save_tiny(tmp_path / "klein", "klein")
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks the tensor .*layers\.0\.mlp\.up_proj"):
        models.load(Flux2Model(path=folder, text_encoder_out_layers=(1, 2)), dtype="float32", device="cpu")


def test_weights_of_other_layers_are_other_weights():
    keys = {
        WeightsKey.of(model("klein", "random", **knobs), dtype="float32", device="cpu")
        for knobs in (
            {}, {"text_encoder_layers": "all"}, {"text_encoder_out_layers": (1,)}, {"text_encoder_out_layers": (2,)},
        )
    }  # fmt: skip
    assert len(keys) == 4


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("source", ["random", "folder"])
def test_the_estimate_before_loading_knows_it(pipeline, source):
    option = model(pipeline, source, text_encoder_out_layers=(1, 2))
    base = models.load(option, dtype="float32", device="cpu")
    from helpers import CPU

    from fluxrun.weights.find import find_weights

    estimated = find_weights(option.model_copy(update={"dtype": "float32"}), CPU).component_bytes["text_encoder"]
    actual = base.facts["components"]["text_encoder"]["bytes"]
    assert actual == pytest.approx(estimated, rel=0.05)


class Waits(TorchDispatchMode):
    """What would make the CPU wait for a GPU: a value read, or a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("_local_scalar_dense", "is_nonzero", "aten.nonzero", "masked_select")):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", ["needed", "all"])
@pytest.mark.parametrize("length", [48, 8])  # padded; cut off, so that nothing is padded
@torch.no_grad()
def test_with_its_mask_made_beforehand_klein_encodes_the_same_and_waits_for_nothing(layers, length):
    pipeline = shells.shell(loaded("klein", "random", layers, (1, 2, 3)))

    def encode() -> tuple[torch.Tensor, list[str]]:
        with Waits() as waits:
            embeds, _ = pipeline.encode_prompt(
                ["a red circle", "a blue square right of a green star"],
                device="cpu", max_sequence_length=length, text_encoder_out_layers=(1, 2, 3),
            )  # fmt: skip
        return embeds, waits.found

    expected, waited = encode()
    pipeline.text_encoder.forward = with_explicit_mask(pipeline.text_encoder)
    embeds, waited_now = encode()
    assert torch.equal(embeds, expected)
    assert waited
    assert not waited_now


def test_other_text_encoders_keep_their_forward():
    encoder = loaded("dev", "random", "needed", (1, 2, 3)).pipeline.text_encoder
    assert with_explicit_mask(encoder) == encoder.forward
