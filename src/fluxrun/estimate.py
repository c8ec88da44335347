"""Memory estimates: what each rung of the memory ladder needs of the GPU and of the computer's own memory. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluxrun.architectures import architecture
from fluxrun.machine import GIB, Machine

if TYPE_CHECKING:
    from fluxrun.options.memory import MemoryKnobs
    from fluxrun.plan import Plan

CONTEXT_BYTES = GIB // 2
"""What a process takes of a GPU outside torch's allocator: the CUDA context, kernels, cuBLAS's own buffers."""

PROCESS_BYTES = 4 * GIB
"""What a process with torch and diffusers takes of the computer's own memory besides the weights."""

PATCH_PIXELS = 16
"""Edge in pixels of the square that becomes one image token."""
LARGEST_LEAF = 40
"""A transformer is at least so many times its largest layer (klein-4B 45, dev 95)."""
LARGEST_BLOCK = 16
"""The same for its blocks (klein-4B 16, dev 33)."""
OUTSIDE_BLOCKS = 16
"""The same for what of it lies outside its blocks (klein-4B 20, dev 40)."""
LARGEST_TEXT_LEAF = 8
"""The same for a cut text encoder, whose largest layer is the embedding table (klein-4B)."""
SPARE_BYTES = GIB // 2
"""What block swap leaves free: torch's allocator loses some between blocks of memory of different sizes."""
SMALL_TEXT_BYTES = 3 * GIB // 2
"""Most that a text encoder has in tensors too small to be swapped (klein-4B 1.4 GB, klein-9B 0.5, dev 0.6)."""


def budget_bytes(memory: MemoryKnobs, machine: Machine) -> int:
    """GPU memory a run may use: what is free, and never more than the budget."""
    free = machine.gpu.free_bytes if machine.gpu else 0
    return min(free, int(memory.budget_gb * GIB)) if memory.budget_gb else free


def decode_bytes(height: int, width: int) -> int:
    """Working memory of decoding a picture whole: ten full-size buffers of 128 two-byte channels.

    1024x1024: 2.68 GB, which is what klein-4B's peak was above its weights (benchmarks/results/klein4b_sweep_h100).
    """
    return height * width * 128 * 2 * 10


def working_bytes(plan: Plan) -> int:
    """Working memory beside the weights: decoding or a step of the transformer, whichever takes more, and copies."""
    height, width = plan.size
    vae = plan.options["vae"]
    tile = getattr(vae, "tile_size", 0) if getattr(vae, "decode", "full") == "tiled" else max(height, width)
    decode = decode_bytes(min(height, tile), min(width, tile))
    if getattr(vae, "decode", "full") != "sliced":
        decode *= plan.config.batch_size
    # The most that lives at once in a single block is about 22 times its two-byte input: projection, q, k, attention,
    # the gated MLP's halves, and their concatenation.
    tokens = (height // PATCH_PIXELS) * (width // PATCH_PIXELS) + plan.model.max_sequence_length
    return max(decode, plan.config.batch_size * tokens * _width(plan) * 2 * 22) + joined_bytes(plan)


def joined_bytes(plan: Plan) -> int:
    """The second copy that fused kernels keep of what they multiply at once: query, key and value of both streams of
    every double block. In bf16 klein-4B 0.5 GB, dev 3.4 (measured: 0.6 and 3.3). Swapped blocks have them side by
    side, and need none."""
    if not getattr(plan.options["kernels"], "joins_projections", False) or plan.options["memory"].swaps_blocks:  # type: ignore[attr-defined]
        return 0
    size = 2 if plan.options["quantization"].name == "none" else 1
    return int(_sizes(plan).get("num_layers", 8)) * 2 * 3 * _width(plan) ** 2 * size


def _in_single_blocks(plan: Plan) -> int:
    """How many single blocks a transformer's blocks amount to; a double block has the weights of two."""
    sizes = _sizes(plan)
    return 2 * int(sizes.get("num_layers", 8)) + int(sizes.get("num_single_layers", 48))


def _width(plan: Plan) -> int:
    """Width of the transformer's hidden states; the widest there is for a checkpoint that is only known by its path."""
    sizes = _sizes(plan)
    return int(sizes.get("num_attention_heads", 48)) * int(sizes.get("attention_head_dim", 128))


def _sizes(plan: Plan) -> dict[str, Any]:
    """The transformer's config; empty for a checkpoint that is only known by its path."""
    name = plan.model.architecture
    return architecture(name, plan.model.pipeline if name == "tiny" else None).transformer if name else {}


def memory_needs(plan: Plan) -> dict[str, int] | None:
    """Estimated bytes on the GPU for each rung of the memory ladder; None where sizes are not known."""
    if not plan.weight_bytes:
        return None
    text, transformer, vae = _parts(plan)
    work, outside = working_bytes(plan), CONTEXT_BYTES
    group = plan.options["memory"]
    largest = LARGEST_BLOCK if getattr(group, "group_level", "leaf") == "block" else LARGEST_LEAF
    leaf = max(transformer // LARGEST_LEAF, text // LARGEST_TEXT_LEAF)
    return {
        "resident": outside + text + transformer + vae + work,
        "staged": outside + max(text, transformer + vae + work),
        "balanced": outside + vae + max(text, transformer + work),
        "block_swap": outside + vae + _least_swapping(plan, text, transformer, work),
        # One group computes while the next one arrives.
        "group": outside + vae + 2 * max(transformer // largest, text // LARGEST_TEXT_LEAF) + work,
        "sequential": outside + leaf + work,
    }


def _least_swapping(plan: Plan, text: int, transformer: int, work: int) -> int:
    """What block swap cannot do with less of: two blocks, what lies outside them, a step's working memory, whose place
    the text encoder takes meanwhile."""
    assert plan.weight_bytes
    outside_blocks = plan.weight_bytes["transformer"] // OUTSIDE_BLOCKS
    two_blocks = 2 * transformer * 2 // _in_single_blocks(plan)
    text_encoder = text // LARGEST_TEXT_LEAF + min(text, SMALL_TEXT_BYTES)
    return SPARE_BYTES + outside_blocks + two_blocks + max(work - joined_bytes(plan), text_encoder)


def need_in_words(plan: Plan, name: str, need: int, budget: int) -> str:
    """``needs about 10.4 of 24.0 GB``; block swap fills what it is given, and says what a step then copies."""
    of = f"{need / GIB:.1f} of {budget / GIB:.1f} GB"
    if name != "block_swap":
        return f"needs about {of}"
    if plan.options["memory"].blocks_to_swap is not None:  # type: ignore[attr-defined]
        return f"needs at least {of}"
    return f"needs at least {of}, copies about {_swapped_bytes(plan, budget - need) / GIB:.0f} GB a step"


def _swapped_bytes(plan: Plan, room: int) -> int:
    """What of the blocks does not fit into ``room`` bytes beyond the least that block swap needs."""
    assert plan.weight_bytes
    _, transformer, _ = _parts(plan)
    blocks = transformer - plan.weight_bytes["transformer"] // OUTSIDE_BLOCKS
    return max(0, blocks - max(0, room))


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
    share = 1 if plan.options["quantization"].name == "none" else 2
    return sizes.get("text_encoder", 0), sizes.get("transformer", 0) // share, sizes.get("vae", 0)
