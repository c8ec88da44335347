"""The sizes are FLUX.2's, and the parameter counts for memory estimates are what the classes really have."""

from __future__ import annotations

import pytest

from fluxrun.architectures import HIDDEN_STATES_READ, MODEL_COMPONENTS, TINY_TEXT_LAYERS, architecture

NAMES = [("klein_4b", "klein"), ("klein_9b", "klein"), ("dev", "dev"), ("tiny", "klein"), ("tiny", "dev")]


@pytest.mark.parametrize(("name", "pipeline"), NAMES)
def test_parameter_counts(name, pipeline):
    from accelerate import init_empty_weights

    from fluxrun.weights.random_weights import builders

    sizes = architecture(name, pipeline)
    for component in MODEL_COMPONENTS:
        with init_empty_weights(include_buffers=False):
            module = builders(sizes)[component]()
        if component == "text_encoder":
            module.tie_weights()
        assert sum(parameter.numel() for parameter in module.parameters()) == sizes.parameters[component]


@pytest.mark.parametrize(("name", "pipeline"), NAMES)
def test_text_encoder_feeds_the_transformer(name, pipeline):
    """The hidden states that are read, side by side, are as wide as the transformer expects."""
    sizes = architecture(name, pipeline)
    text = sizes.text_encoder.get("text_config", sizes.text_encoder)
    layers = TINY_TEXT_LAYERS if name == "tiny" else HIDDEN_STATES_READ[pipeline]
    assert len(layers) * text["hidden_size"] == sizes.transformer["joint_attention_dim"]
    assert max(layers) < text["num_hidden_layers"]


@pytest.mark.parametrize("pipeline", ["klein", "dev"])
def test_tiny_is_tiny(pipeline):
    assert sum(architecture("tiny", pipeline).parameters.values()) < 700_000


def test_bytes():
    sizes = architecture("klein_4b")
    assert sizes.bytes_in("float32")["vae"] == 4 * sizes.parameters["vae"] == 2 * sizes.bytes_in("bfloat16")["vae"]


def test_architecture_and_pipeline_must_agree():
    with pytest.raises(ValueError, match="klein_4b belongs to pipeline klein, not dev"):
        architecture("klein_4b", "dev")
