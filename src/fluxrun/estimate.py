"""Memory estimates: what each rung of the memory ladder needs of the GPU and of the computer's own memory. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fluxrun.architectures import HIDDEN_STATES_READ, Architecture, architecture
from fluxrun.machine import GIB, Machine
from fluxrun.swap_sizes import StackSizes, text_encoder_sizes, transformer_sizes, unknown_sizes

if TYPE_CHECKING:
    from fluxrun.options.memory import MemoryKnobs
    from fluxrun.plan import Plan

CONTEXT_BYTES = GIB // 2
"""What a process takes of a GPU outside torch's allocator: the CUDA context, kernels, cuBLAS's own buffers."""

PROCESS_BYTES = 4 * GIB
"""What a process with torch and diffusers takes of the computer's own memory besides the weights."""

PATCH_PIXELS = 16
"""Edge in pixels of the square that becomes one image token."""
LARGEST_REFERENCE = 1024
"""The pipelines scale reference pictures of a larger area than this edge's square down to it."""
LARGEST_LEAF = 40
"""A transformer is at least so many times its largest layer (klein-4B 45, dev 95)."""
LARGEST_BLOCK = 16
"""The same for its blocks (klein-4B 16, dev 33)."""
LARGEST_TEXT_LEAF = 8
"""The same for a cut text encoder of unknown sizes, whose largest layer is the embedding table (klein-4B)."""
SPARE_BYTES = GIB // 2
"""What block swap leaves free: torch's allocator loses some between blocks of memory of different sizes."""
UNKNOWN_PARTS = 12
"""Equal parts that a module of unknown sizes is thought of to have: real ones have more, and smaller ones."""


def budget_bytes(memory: MemoryKnobs, machine: Machine) -> int:
    """GPU memory a run may use: what is free, and never more than the budget."""
    free = machine.gpu.free_bytes if machine.gpu else 0
    return min(free, int(memory.budget_gb * GIB)) if memory.budget_gb else free


def decode_bytes(height: int, width: int) -> int:
    """Working memory of decoding a picture whole: ten full-size buffers of 128 two-byte channels.

    1024x1024: 2.68 GB, which is what klein-4B's peak was above its weights (benchmarks/results/klein4b_sweep_h100).
    """
    return height * width * 128 * 2 * 10


def reference_tokens(pictures: Sequence[Any]) -> int:
    """Tokens that reference pictures (PIL images) add to the transformer's sequence."""
    areas = (min(picture.width * picture.height, LARGEST_REFERENCE**2) for picture in pictures)
    return sum(area // PATCH_PIXELS**2 for area in areas)


def working_bytes(plan: Plan) -> int:
    """Working memory beside the weights: decoding or a step of the transformer, whichever takes more, and copies."""
    height, width = plan.size
    vae = plan.options["vae"]
    tile = getattr(vae, "tile_size", 0) if getattr(vae, "decode", "full") == "tiled" else max(height, width)
    decode = decode_bytes(min(height, tile), min(width, tile))
    if plan.reference_tokens:  # encoding one takes no more than decoding it: the VAE's two halves have the same widths
        decode = max(decode, decode_bytes(min(LARGEST_REFERENCE, tile), min(LARGEST_REFERENCE, tile)))
    if getattr(vae, "decode", "full") != "sliced":
        decode *= plan.config.batch_size
    # The most that lives at once in a single block is about 22 times its two-byte input: projection, q, k, attention,
    # the gated MLP's halves, and their concatenation.
    tokens = (height // PATCH_PIXELS) * (width // PATCH_PIXELS) + plan.model.max_sequence_length + plan.reference_tokens
    return max(decode, plan.config.batch_size * tokens * _width(plan) * 2 * 22) + _joined_bytes(plan)


def _joined_bytes(plan: Plan) -> int:
    """The second copy that fused kernels keep of what they multiply at once: query, key and value of both streams of
    every double block. In bf16 klein-4B 0.5 GB, dev 3.4 (measured: 0.6 and 3.3)."""
    if not getattr(plan.options["kernels"], "joins_projections", False):
        return 0
    size = _itemsize(plan) // _share(plan)
    return int(_sizes(plan).get("num_layers", 8)) * 2 * 3 * _width(plan) ** 2 * size


def _width(plan: Plan) -> int:
    """Width of the transformer's hidden states; the widest there is for a checkpoint that is only known by its path."""
    sizes = _sizes(plan)
    return int(sizes.get("num_attention_heads", 48)) * int(sizes.get("attention_head_dim", 128))


def _sizes(plan: Plan) -> dict[str, Any]:
    """The transformer's config; empty for a checkpoint that is only known by its path."""
    found = _architecture(plan)
    return found.transformer if found else {}


def _architecture(plan: Plan) -> Architecture | None:
    name = plan.model.architecture
    return architecture(name, plan.model.pipeline if name == "tiny" else None) if name else None


def memory_needs(plan: Plan) -> dict[str, int] | None:
    """Estimated bytes on the GPU for each rung of the memory ladder; None where sizes are not known."""
    if not plan.weight_bytes:
        return None
    text, transformer, vae = _parts(plan)
    work, outside = working_bytes(plan), CONTEXT_BYTES
    group = plan.options["memory"]
    largest = LARGEST_BLOCK if getattr(group, "group_level", "leaf") == "block" else LARGEST_LEAF
    blocks, asked = _transformer_sizes(plan), _blocks_to_swap(plan)
    swapped = len(blocks.blocks) if asked is None else min(asked, len(blocks.blocks))
    text_leaf = _largest_text_leaf(plan, text)
    leaf = max(transformer // LARGEST_LEAF, text_leaf)
    return {
        "resident": outside + text + transformer + vae + work,
        "staged": outside + max(text, transformer + vae + work),
        "balanced": outside + vae + max(text, transformer + work),
        "block_swap": _beside_swapping(plan) + blocks.on_gpu(swapped),
        # One group computes while the next one arrives.
        "group": outside + vae + 2 * max(transformer // largest, text_leaf) + work,
        "sequential": outside + leaf + work,
    }


def _beside_swapping(plan: Plan) -> int:
    """What block swap needs besides the transformer: the text encoder takes the place of a step's working memory."""
    assert plan.weight_bytes
    text = _text_encoder_sizes(plan)
    encoding = text.on_gpu(len(text.blocks))
    return CONTEXT_BYTES + SPARE_BYTES + plan.weight_bytes.get("vae", 0) + max(swapping_work(plan), encoding)


def swapping_work(plan: Plan) -> int:
    """``working_bytes`` under block swap: its blocks have side by side what fused kernels otherwise copy."""
    return working_bytes(plan) - _joined_bytes(plan)


def need_in_words(plan: Plan, name: str, need: int, budget: int) -> str:
    """``needs about 10.4 of 24.0 GB``; block swap fills what it is given, and says what a step then copies."""
    of = f"{need / GIB:.1f} of {budget / GIB:.1f} GB"
    if name != "block_swap":
        return f"needs about {of}"
    sizes = _transformer_sizes(plan)
    count = sizes.count(_blocks_to_swap(plan), budget - _beside_swapping(plan))
    moved = sum(sizes.away(count)) / GIB
    return f"needs at least {of}, swaps {count} of {len(sizes.blocks)} blocks, {moved:.1f} GB a step"


def _blocks_to_swap(plan: Plan) -> int | None:
    return getattr(plan.options["memory"], "blocks_to_swap", None)


def _transformer_sizes(plan: Plan) -> StackSizes:
    config = _sizes(plan)
    assert plan.weight_bytes
    total, itemsize = plan.weight_bytes.get("transformer", 0), _itemsize(plan)
    share = _share(plan)
    if not config:
        return unknown_sizes(total // share, UNKNOWN_PARTS)
    return transformer_sizes(config, total, itemsize, itemsize // share)


def _text_encoder_sizes(plan: Plan) -> StackSizes:
    assert plan.weight_bytes
    total, model = plan.weight_bytes.get("text_encoder", 0), plan.model
    found = _architecture(plan)
    if found is None:
        return unknown_sizes(total, UNKNOWN_PARTS)
    read = model.text_encoder_out_layers or HIDDEN_STATES_READ[found.pipeline]
    whole = model.text_encoder_layers == "all"
    return text_encoder_sizes(found.text, total, _itemsize(plan), None if whole else tuple(read))


def _largest_text_leaf(plan: Plan, text: int) -> int:
    """Bytes of the text encoder's embedding table."""
    found = _architecture(plan)
    if found is None:
        return text // LARGEST_TEXT_LEAF
    return int(found.text["vocab_size"] * found.text["hidden_size"] * _itemsize(plan))


def _itemsize(plan: Plan) -> int:
    return 4 if plan.dtype == "float32" else 2


def _share(plan: Plan) -> int:
    """By how much quantization shrinks the transformer's blocks."""
    return 1 if plan.options["quantization"].name == "none" else _itemsize(plan)


def ram_needs(plan: Plan) -> dict[str, int] | None:
    """Estimated bytes of the computer's own memory at their peak: components are loaded there one by one."""
    if not plan.weight_bytes:
        return None
    text, transformer, vae = _parts(plan)
    unquantized = plan.weight_bytes.get("transformer", 0)
    passing = PROCESS_BYTES + max(text, unquantized)
    staying = PROCESS_BYTES + max(unquantized, text + transformer + vae)  # the transformer is loaded first
    offloaded = ("balanced", "block_swap", "group", "sequential")
    return {"resident": passing, "staged": passing, **dict.fromkeys(offloaded, staying)}


def _parts(plan: Plan) -> tuple[int, int, int]:
    """Bytes of text encoder, transformer and VAE, as they will lie in memory."""
    sizes = plan.weight_bytes or {}
    return sizes.get("text_encoder", 0), sizes.get("transformer", 0) // _share(plan), sizes.get("vae", 0)
