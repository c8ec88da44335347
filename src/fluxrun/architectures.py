"""Sizes of the FLUX.2 models, as plain data: what ``weights=random`` builds and what memory estimates are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from fluxrun.types import Json

PATCH_PIXELS = 16
"""Edge in pixels of the square that becomes one image token."""

LARGEST_REFERENCE = 1024
"""The pipelines scale reference pictures of a larger area than this edge's square down to it."""

Family = Literal["klein", "dev"]
"""What weights belong to: their text encoder and how the transformer is called."""

PipelineKind = Literal["klein", "klein_inpaint", "klein_kv", "dev"]
"""What is called with them: klein weights can be drawn with by three pipelines."""

ArchitectureName = Literal["dev", "klein_4b", "klein_9b", "tiny"]

Config = dict[str, Any]
"""Arguments of a config class of transformers or diffusers."""


class TransformerConfig(TypedDict, total=False):
    """Arguments of ``Flux2Transformer2DModel``, whose defaults are dev's sizes."""

    in_channels: int
    num_layers: int
    """Of its double blocks."""
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    timestep_guidance_channels: int
    axes_dims_rope: tuple[int, ...]
    guidance_embeds: bool


class TextConfig(TypedDict):
    """What a language model's memory follows from."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool


PIPELINE_CLASSES: dict[str, PipelineKind] = {
    "Flux2KleinPipeline": "klein",
    "Flux2KleinInpaintPipeline": "klein",  # to inpaint is asked of a run, nothing in the weights is made for it
    "Flux2KleinKVPipeline": "klein_kv",
    "Flux2Pipeline": "dev",
}
"""The diffusers pipeline classes that a checkpoint may name."""


def family(pipeline: PipelineKind) -> Family:
    """The family of weights that a pipeline draws with."""
    return "dev" if pipeline == "dev" else "klein"


MODEL_COMPONENTS = ("text_encoder", "transformer", "vae")
"""Pipeline components that hold weights, in the order in which they are loaded and run."""

HIDDEN_STATES_READ: dict[Family, tuple[int, ...]] = {"klein": (9, 18, 27), "dev": (10, 20, 30)}
"""Text-encoder hidden states that become the prompt embedding: the pipelines' own defaults."""


def layers_needed(total: int, read: tuple[int, ...]) -> int:
    """How many of a text encoder's ``total`` layers it takes to have the hidden states ``read``.

    Hidden state n is the output of the n-th layer. The very last one comes with the final norm, and a negative index
    counts from it: then all are needed.
    """
    return max(1, *read) if all(0 <= index < total for index in read) else total


SCHEDULER: Config = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,  # the pipelines compute mu from size and steps and hand it over
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}

VAE: Config = {}  # AutoencoderKLFlux2's own defaults are FLUX.2's sizes


@dataclass(frozen=True)
class Architecture:
    """One model: the arguments of its components' config classes.

    ``text_encoder`` is a Qwen3Config for the klein pipeline and a Mistral3Config for dev. ``parameters`` counts
    each component's parameters, tied ones once. ``init_std`` is the standard deviation of random matrices; None
    scales each with its fan-in, which keeps a small model's signal alive through all its layers.
    """

    name: ArchitectureName
    pipeline: Family
    transformer: TransformerConfig
    text_encoder: Config
    vae: Config
    parameters: dict[str, int]
    init_std: float | None = 0.02

    @property
    def text(self) -> TextConfig:
        """The language model's own sizes: dev's are nested beside its vision tower's."""
        config: Config = {**self.text_encoder, **self.text_encoder.get("text_config", {})}
        return TextConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            tie_word_embeddings=config["tie_word_embeddings"],
        )

    def bytes_in(self, dtype: str) -> dict[str, int]:
        """Weight bytes of each component in ``dtype`` (float32, bfloat16 or float16)."""
        size = 4 if dtype == "float32" else 2
        return {component: count * size for component, count in self.parameters.items()}

    def unread_text_parameters(self, read: tuple[int, ...]) -> int:
        """Parameters of the text encoder that no hidden state of ``read`` needs: layers behind, an untied head."""
        text = self.text
        dropped = text["num_hidden_layers"] - layers_needed(text["num_hidden_layers"], read)
        head = 0 if text["tie_word_embeddings"] else text["vocab_size"] * text["hidden_size"]
        return dropped * sum(text_layer(text)) + head


def text_layer(text: TextConfig) -> tuple[int, ...]:
    """Parameters of each matrix in a language model's layer: query, key, value, output, gate, up, down."""
    query, key = text["num_attention_heads"] * text["head_dim"], text["num_key_value_heads"] * text["head_dim"]
    wide = text["intermediate_size"]
    return tuple(text["hidden_size"] * width for width in (query, key, key, query, wide, wide, wide))


def _qwen3(*, hidden_size: int, intermediate_size: int, tie_word_embeddings: bool) -> Config:
    """A Qwen3 text encoder, by what differs between 4B and 8B."""
    return {
        "vocab_size": 151936,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "tie_word_embeddings": tie_word_embeddings,
    }


KLEIN_4B = Architecture(
    name="klein_4b",
    pipeline="klein",
    transformer={
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 3 * 2560,
        "guidance_embeds": False,
    },
    text_encoder=_qwen3(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True),
    vae=VAE,
    parameters={"text_encoder": 4_022_468_096, "transformer": 3_875_544_576, "vae": 84_046_115},
)

KLEIN_9B = Architecture(
    name="klein_9b",
    pipeline="klein",
    transformer={
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 3 * 4096,
        "guidance_embeds": False,
    },
    text_encoder=_qwen3(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False),
    vae=VAE,
    parameters={"text_encoder": 8_190_735_360, "transformer": 9_078_581_248, "vae": 84_046_115},
)


# Mistral-Small-3.x-24B with its Pixtral vision tower: the pipeline never feeds it images while drawing, but the
# checkpoint holds it, so it is part of what a machine must carry.
DEV = Architecture(
    name="dev",
    pipeline="dev",
    transformer={
        "num_layers": 8,
        "num_single_layers": 48,
        "num_attention_heads": 48,
        "joint_attention_dim": 3 * 5120,
        "guidance_embeds": True,
    },
    text_encoder={
        "tie_word_embeddings": False,
        "image_token_index": 10,
        "spatial_merge_size": 2,
        "text_config": {
            "model_type": "mistral",
            "vocab_size": 131072,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000_000.0},
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 1540,
            "patch_size": 14,
        },
    },
    vae=VAE,
    parameters={"text_encoder": 24_011_361_280, "transformer": 32_223_281_152, "vae": 84_046_115},
)


# The tiny model has every part of the real one (both kinds of blocks, four VAE levels, more text layers than are
# read), so whatever an option does to a real model it does to this one; only the widths are small.
_TINY_HIDDEN = 32

_TINY_TRANSFORMER: TransformerConfig = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 3 * _TINY_HIDDEN,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (8, 8, 8, 8),
}

_TINY_VAE: Config = {
    "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}

_TINY_TEXT: Config = {
    "vocab_size": 384,
    "hidden_size": _TINY_HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
}

TINY_TEXT_LAYERS = (1, 2, 3)
"""Hidden states read from the tiny text encoder (it has four layers, so one is unread, as in the real ones)."""


def _tiny(pipeline: Family) -> Architecture:
    if pipeline == "klein":
        text: Config = {**_TINY_TEXT, "tie_word_embeddings": True}
    else:
        text = {
            "tie_word_embeddings": False,
            "text_config": {**_TINY_TEXT, "model_type": "mistral", "sliding_window": None},
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 16,
            },
        }
    return Architecture(
        name="tiny",
        pipeline=pipeline,
        transformer={**_TINY_TRANSFORMER, "guidance_embeds": pipeline == "dev"},
        text_encoder=text,
        vae=_TINY_VAE,
        parameters={
            "text_encoder": 49_568 if pipeline == "klein" else 102_816,
            "transformer": 297_216 if pipeline == "klein" else 303_360,
            "vae": 261_079,
        },
        init_std=None,
    )


def architecture(name: ArchitectureName, pipeline: PipelineKind | None = None) -> Architecture:
    """The sizes called ``name``; ``pipeline`` chooses between the two tiny models (klein when None).

    Raises ValueError when ``pipeline`` is not the one that the architecture belongs to.
    """
    if name == "tiny":
        return _tiny(family(pipeline or "klein"))
    found = {"dev": DEV, "klein_4b": KLEIN_4B, "klein_9b": KLEIN_9B}[name]
    if pipeline is not None and family(pipeline) != found.pipeline:
        raise ValueError(f"architecture {name} belongs to pipeline {found.pipeline}, not {pipeline}")
    return found


def recognised(transformer: Mapping[str, Json]) -> ArchitectureName | None:
    """The architecture that a checkpoint's transformer/config.json is of; None for sizes of its own."""
    names: tuple[ArchitectureName, ...] = ("dev", "klein_4b", "klein_9b", "tiny")
    return next((name for name in names if _is_of(transformer, architecture(name))), None)


def _is_of(transformer: Mapping[str, Json], sizes: Architecture) -> bool:
    as_json = {key: list(value) if isinstance(value, tuple) else value for key, value in sizes.transformer.items()}
    # Both tiny models are called tiny.
    return all(transformer.get(key) == value for key, value in as_json.items() if key != "guidance_embeds")
