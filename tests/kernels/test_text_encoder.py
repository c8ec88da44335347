"""klein's text encoder with other kernels between its matmuls: the bits of transformers' own operations."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fluxrun.kernels.text_encoder import proof, torch_ops
from fluxrun.kernels.text_encoder.layers import FusedLayer, fuse
from fluxrun.kernels.text_encoder.proof import Ops, Samples, Sizes, proven

TOKENS = 24


def encoder(dtype: torch.dtype = torch.float32, **changes: object) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Qwen3Config(**{**sizes, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50, **changes})
    return Qwen3ForCausalLM(config).to(dtype).eval()


def hidden_states(model: Qwen3ForCausalLM, batch: int = 1, mask: bool = True) -> list[torch.Tensor]:
    ids = torch.randint(0, 50, (batch, TOKENS), generator=torch.Generator().manual_seed(0))
    padding = (torch.arange(TOKENS) < torch.tensor([[9], [24]][:batch])).long()
    with torch.no_grad():
        given = {"attention_mask": padding} if mask else {}
        return list(model(input_ids=ids, output_hidden_states=True, use_cache=False, **given).hidden_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"hidden_size": 48}])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_hidden_state_is_the_same(dtype, changes, batch):
    model = encoder(dtype, **changes)
    expected = hidden_states(model, batch)
    facts = fuse(model, TOKENS)
    assert facts["text_encoder_layers"] == 3
    assert set(facts["text_encoder"]) == {"add_rms_norm", "heads", "swiglu"}
    assert all(isinstance(layer.forward, FusedLayer) for layer in model.model.layers)
    assert all(map(torch.equal, hidden_states(model, batch), expected))


def test_what_it_does_not_know_is_left_to_transformers():
    model = encoder()
    whole, ids = hidden_states(model, mask=False), torch.randint(0, 50, (1, 5))
    generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    fuse(model, TOKENS)
    assert all(map(torch.equal, hidden_states(model, mask=False), whole))
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0), generated)


def test_other_text_encoders_stay_as_they_are():
    assert fuse(None, TOKENS) == {"text_encoder_layers": 0, "text_encoder": "not in this pipeline"}
    model = encoder()
    model.config.model_type = "mistral"
    assert fuse(model, TOKENS)["text_encoder_layers"] == 0
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_a_layer_with_other_bits_is_not_replaced(monkeypatch):
    model = encoder()
    off = Ops(swiglu=lambda gate, up: torch_ops.swiglu(gate, up) * (1 + 1e-6))
    monkeypatch.setattr("fluxrun.kernels.text_encoder.layers.proven", lambda *_: off)
    facts = fuse(model, TOKENS)
    assert (facts["text_encoder_layers"], "other bits" in facts["text_encoder"]) == (0, True)
    assert not any("forward" in vars(layer) for layer in model.model.layers)


SIZES = Sizes(width=256, heads=4, key_heads=2, head_size=128, hidden=384, eps=1e-6, tokens=TOKENS)


def test_only_kernels_with_the_same_bits_are_taken(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such instruction")

    candidates = {
        "add_rms_norm": [("wrong", lambda x, y, norm: (x, x)), ("right", torch_ops.add_rms_norm)],
        "heads": [("broken", broken)],
        "swiglu": [],
    }
    monkeypatch.setattr(proof, "candidates", lambda _: candidates)
    monkeypatch.setattr(proof, "can_be_ours", lambda *_: True)
    ops = proven(SIZES, torch.bfloat16, torch.device("cpu"))
    assert ops.by == {
        "add_rms_norm": "right",
        "heads": "torch (no such instruction)",
        "swiglu": "torch (no kernel for these sizes)",
    }
    assert ops.heads is torch_ops.heads


def test_samples_have_large_and_small_rows_and_no_infinity():
    samples = Samples(SIZES, torch.bfloat16, torch.device("cpu"))
    (x, y, norm), (_, nothing, _) = samples.add_rms_norm()
    assert nothing is None
    size = x[0].float().norm(dim=-1)
    assert size.max() > 1e5 * size.min()
    results = [torch_ops.add_rms_norm(x, y, norm)[1], *torch_ops.heads(*samples.heads()[0])]
    results.append(torch_ops.swiglu(*samples.swiglu()[0]))
    assert all(result.isfinite().all() for result in results)


def test_copies_are_independent():
    model = encoder()
    other = copy.deepcopy(model)
    fuse(model, TOKENS)
    assert not any("forward" in vars(layer) for layer in other.model.layers)
