"""Random weights: the real architectures at real size, straight on the device, and a tokenizer made in process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from torch import nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fluxrun.architectures import MODEL_COMPONENTS, SCHEDULER, Architecture, architecture
from fluxrun.options.model import Flux2Model
from fluxrun.weights.text_encoder import NeededLayers

SEED = 0
"""Seed of random weights: two builds are bit-identical."""


def builders(sizes: Architecture) -> dict[str, Callable[[], Any]]:
    """For each pipeline component, a function that makes it with ``sizes`` (on whatever device is the default)."""
    return {
        "transformer": lambda: Flux2Transformer2DModel(**sizes.transformer),
        "vae": lambda: AutoencoderKLFlux2(**sizes.vae),
        "text_encoder": lambda: random_text_encoder(sizes),
        "tokenizer": byte_tokenizer,
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(**SCHEDULER),
    }


def random_source(model: Flux2Model, dtype: str, device: str, needed: NeededLayers | None) -> Callable[[str], Any]:
    """A function that builds one component of ``model``'s architecture by its pipeline name."""
    assert model.architecture is not None  # find_weights refused everything else
    sizes = architecture(model.architecture, model.pipeline)
    build = builders(sizes) | {"text_encoder": lambda: random_text_encoder(sizes, needed)}

    def make(name: str) -> Any:
        if name not in MODEL_COMPONENTS:
            return build[name]()
        # include_buffers=False: parameters are created on meta, in no time and no memory; buffers are real, as
        # rotary frequencies, which are in no state dict, could not be filled in later.
        with init_empty_weights(include_buffers=False):
            module = build[name]()
        if isinstance(module, PreTrainedModel):
            module.tie_weights()  # a tie made while every assignment made a new meta parameter did not hold
            if needed is not None:
                needed.trim(module)
        _fill(module, getattr(torch, dtype), device, sizes.init_std)
        return module

    return make


def random_text_encoder(sizes: Architecture, needed: NeededLayers | None = None) -> nn.Module:
    """An architecture's text encoder, of its ``needed`` layers alone where they are given."""
    arguments = copy.deepcopy(sizes.text_encoder)  # transformers turns the nested dicts into objects in place
    if sizes.pipeline == "klein":
        qwen = Qwen3Config(**arguments)
        return Qwen3ForCausalLM(qwen if needed is None else needed.cut(qwen))
    mistral = Mistral3Config(**arguments)
    return Mistral3ForConditionalGeneration(mistral if needed is None else needed.cut(mistral))


def _fill(module: nn.Module, dtype: torch.dtype, device: str, std: float | None) -> None:
    """Give a module built on meta its parameters: norms 1, biases 0, matrices normal; ties are kept.

    With a ``std`` the numbers are drawn in ``dtype`` on the accelerator, tensor by tensor: a 32-billion-parameter
    transformer never passes through the CPU, and is the same one wherever it is placed. Without one (small models)
    they are drawn in float32 on the CPU, so that every device gets the same model, with ``1 / sqrt(fan_in)`` as
    standard deviation.
    """
    where, number = (_drawing_device(device), dtype) if std else ("cpu", torch.float32)
    generator = torch.Generator(where).manual_seed(SEED)
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, old in list(owner._parameters.items()):
            if old is None:
                continue
            if id(old) not in made:
                value = torch.empty(old.shape, dtype=number, device=where)
                _initialise(value, name, std, generator)
                made[id(old)] = nn.Parameter(value.to(device, dtype), requires_grad=False)
            owner._parameters[name] = made[id(old)]
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                # As from_pretrained leaves them: saved statistics in the model's dtype, rotary tables float32.
                saved = buffer.is_floating_point() and name not in owner._non_persistent_buffers_set
                owner._buffers[name] = buffer.to(device, dtype if saved else buffer.dtype)


def _drawing_device(device: str) -> str:
    """``device``, but a GPU for weights that are placed on the CPU to be offloaded: it draws them far faster."""
    return "cuda" if device == "cpu" and torch.cuda.is_available() else device


@torch.no_grad()
def _initialise(value: torch.Tensor, name: str, std: float | None, generator: torch.Generator) -> None:
    if value.ndim < 2:
        value.fill_(0.0 if name == "bias" else 1.0)
    else:
        fan_in = value[0].numel()
        value.normal_(0.0, std or fan_in**-0.5, generator=generator)


CHAT_TEMPLATE = (
    # Only what the user says: the dev pipeline's long system message would fill a short context by itself.
    # dev sends content as a list of typed entries, klein as a string.
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for entry in message['content'] %}{{ entry.get('text', '') }}{% endfor %}{% endif %}"
    "{{ '<|end|>' }}{% endif %}{% endfor %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without any file: one token per UTF-8 byte, padded on the left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<|pad|>", "<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
