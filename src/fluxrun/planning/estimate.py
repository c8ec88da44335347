"""Memory estimates: what each memory option needs of the GPU and of the computer's own memory. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fluxrun.architectures import (
    HIDDEN_STATES_READ,
    LARGEST_REFERENCE,
    PATCH_PIXELS,
    Architecture,
    TransformerConfig,
    architecture,
)
from fluxrun.hardware.machine import CONTEXT_BYTES, PROCESS_BYTES
from fluxrun.offload.block_sizes import (
    SPARE_BYTES,
    BlockSizes,
    text_encoder_sizes,
    transformer_sizes,
    unknown_sizes,
)
from fluxrun.options.base import MemoryNeed
from fluxrun.options.kernels import KernelsOption
from fluxrun.options.memory import MemoryOption
from fluxrun.options.model import Flux2Model
from fluxrun.options.quantization import QuantizationOption
from fluxrun.options.vae import VaeOption, decode_bytes
from fluxrun.quantization.declared import Declared

LARGEST_LEAF = 40
"""A transformer is at least so many times its largest layer (klein-4B 45, dev 95)."""
LARGEST_BLOCK = 16
"""The same for its blocks (klein-4B 16, dev 33)."""
LARGEST_TEXT_LEAF = 8
"""The same for a cut text encoder of unknown sizes, whose largest layer is the embedding table (klein-4B)."""
UNKNOWN_PARTS = 12
"""Equal parts that a module of unknown sizes is thought of to have: real ones have more, and smaller ones."""
OFFLOADED = ("balanced", "block_swap", "group", "sequential")
"""Memory options under which the weights stay in the computer's own memory."""


def image_tokens(height: int, width: int) -> int:
    """Tokens of a picture of this size in pixels."""
    return (height // PATCH_PIXELS) * (width // PATCH_PIXELS)


@dataclass(frozen=True)
class Estimate:
    """What a run takes of memory, from its sizes and the options that change them. Bytes."""

    weight_bytes: Mapping[str, int] | None
    """Bytes of the model's components, where they are known before loading."""
    height: int
    width: int
    batch_size: int
    reference_tokens: int
    dtype: str
    model: Flux2Model
    vae: VaeOption
    memory: MemoryOption
    kernels: KernelsOption
    quantization: QuantizationOption
    adapter_elements: int = 0
    """Numbers in LoRA matrices, which are in the run's dtype whatever the weights beside them are."""
    guidance_batched: bool = False
    declared: Mapping[str, Declared] = field(default_factory=dict)
    """Components whose bytes are of weights that are quantized already."""
    weight_shares: int = 1
    """On how many GPUs the transformer's weights are spread out."""

    # -- what is asked of it ------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Sequence length of the transformer: image, reference and text tokens."""
        return image_tokens(self.height, self.width) + self.reference_tokens + self.model.max_sequence_length

    @property
    def heads(self) -> int | None:
        """The transformer's attention heads, where its sizes are known."""
        sizes = self._sizes()
        return int(sizes.get("num_attention_heads", 48)) if sizes or self._architecture() else None

    def memory_needs(self) -> dict[str, MemoryNeed] | None:
        """Estimated bytes on the GPU for each memory option; None where sizes are not known."""
        if not self.weight_bytes:
            return None
        text, transformer, vae = self._parts()
        work, outside = self.working_bytes(), CONTEXT_BYTES
        largest = LARGEST_BLOCK if self.memory.group_level == "block" else LARGEST_LEAF
        text_leaf = self._largest_text_leaf(text)
        leaf = max(transformer // LARGEST_LEAF, text_leaf)
        return {
            "resident": MemoryNeed(outside + text + transformer + vae + work),
            "staged": MemoryNeed(outside + max(text, transformer + vae + work)),
            "balanced": MemoryNeed(outside + vae + max(text, transformer + work)),
            "block_swap": self._block_swap(),
            # One group computes while the next one arrives.
            "group": MemoryNeed(outside + vae + 2 * max(transformer // largest, text_leaf) + work),
            "sequential": MemoryNeed(outside + leaf + work),
        }

    def ram_needs(self) -> dict[str, int] | None:
        """Estimated bytes of the computer's own memory at their peak: components are loaded there one by one."""
        if not self.weight_bytes:
            return None
        text, transformer, vae = self._parts()
        unquantized, whole_text = self._bytes_of("transformer"), self._bytes_of("text_encoder")
        passing = PROCESS_BYTES + max(whole_text, unquantized)
        # The transformer is loaded first.
        staying = PROCESS_BYTES + max(unquantized, transformer + whole_text, text + transformer + vae)
        return {"resident": passing, "staged": passing, **dict.fromkeys(OFFLOADED, staying)}

    def working_bytes(self) -> int:
        """Working memory beside the weights: decoding or a transformer step, whichever takes more, and copies."""
        decode = decode_bytes(*self.vae.decoded_at_once(self.height, self.width))
        if self.reference_tokens:  # encoding one takes no more than decoding it: the VAE's halves have the same widths
            decode = max(decode, decode_bytes(*self.vae.decoded_at_once(LARGEST_REFERENCE, LARGEST_REFERENCE)))
        if not self.vae.splits_batches:
            decode *= self.batch_size
        # The most that lives at once in a single block is about 22 times its two-byte input: projection, q, k,
        # attention, the gated MLP's halves, and their concatenation. With adapters it is in a projection: what the
        # weights make (9 times), what is added, and their sum.
        at_once = self.batch_size * (2 if self.guidance_batched else 1)
        step = at_once * self.tokens * self._width() * 2 * (30 if self.adapter_elements else 22)
        return max(decode, step + self._remembered_bytes()) + self._joined_bytes()

    def swapping_bytes(self) -> int:
        """``working_bytes`` under block swap: its blocks have side by side what fused kernels otherwise copy."""
        return self.working_bytes() - self._joined_bytes()

    # -- block swap ---------------------------------------------------------------------------------------------------

    def _block_swap(self) -> MemoryNeed:
        blocks, asked = self._transformer_sizes(), self.memory.blocks_to_swap
        swapped = len(blocks.blocks) if asked is None else min(asked, len(blocks.blocks))
        beside = self._beside_swapping()
        return MemoryNeed(beside + blocks.on_gpu(swapped), blocks, beside, asked)

    def _beside_swapping(self) -> int:
        """What block swap needs besides the transformer: the text encoder takes the place of a step's memory."""
        text = self._text_encoder_sizes()
        encoding = text.on_gpu(len(text.blocks))
        return CONTEXT_BYTES + SPARE_BYTES + self._bytes_of("vae") + max(self.swapping_bytes(), encoding)

    def _transformer_sizes(self) -> BlockSizes:
        config, itemsize, share = self._sizes(), self._itemsize(), self._share("transformer")
        adapters = self._adapter_bytes()
        if not config:
            return unknown_sizes(self.in_memory("transformer") + adapters, UNKNOWN_PARTS)
        return transformer_sizes(config, self._unquantized("transformer") + adapters, itemsize, itemsize * share)

    def _text_encoder_sizes(self) -> BlockSizes:
        total, found = self.in_memory("text_encoder"), self._architecture()
        if found is None:
            return unknown_sizes(total, UNKNOWN_PARTS)
        read = self.model.text_encoder_out_layers or HIDDEN_STATES_READ[found.pipeline]
        whole = self.model.text_encoder_layers == "all"
        itemsize = self._itemsize() * self._share("text_encoder")
        return text_encoder_sizes(found.text, total, itemsize, None if whole else tuple(read))

    # -- sizes --------------------------------------------------------------------------------------------------------

    def _parts(self) -> tuple[int, int, int]:
        """Bytes of text encoder, transformer with its adapters, and VAE, as they will lie in memory."""
        transformer = self.in_memory("transformer") // self.weight_shares + self._adapter_bytes()
        return self.in_memory("text_encoder"), transformer, self._bytes_of("vae")

    def _adapter_bytes(self) -> int:
        return self.adapter_elements * self._itemsize()

    def _bytes_of(self, component: str) -> int:
        return (self.weight_bytes or {}).get(component, 0)

    def in_memory(self, component: str) -> int:
        """Bytes of a component once it is loaded: what is converted then takes less, but for the embedding table."""
        total = self._bytes_of(component)
        if (loaded := self.quantization.loaded_bytes(component)) is not None:
            return loaded
        if not self.quantization.converts(component):
            return total
        kept = self._largest_text_leaf(total) if component == "text_encoder" else 0
        return kept + int((total - kept) * self._share(component))

    def _unquantized(self, component: str) -> int:
        """Bytes of a component before anything was converted, of a quantized checkpoint by its architecture."""
        found = self._architecture()
        if component not in self.declared or found is None:
            return self._bytes_of(component)
        unread = 0
        if component == "text_encoder" and self.model.text_encoder_layers == "needed":
            unread = found.unread_text_parameters(
                self.model.text_encoder_out_layers or HIDDEN_STATES_READ[found.pipeline]
            )
        return (found.parameters[component] - unread) * self._itemsize()

    def _share(self, component: str) -> float:
        """What is left of the bytes of a component's layers by quantization."""
        option = self.quantization
        if component in self.declared:
            return min(1.0, self._bytes_of(component) / max(1, self._unquantized(component)))
        if not option.converts(component) or option.bits is None:
            return 1
        return option.bits / (8 * self._itemsize())

    def _joined_bytes(self) -> int:
        """The second copy that fused kernels keep of what they multiply at once: query, key and value of both streams
        of every double block. In bf16 klein-4B 0.5 GB, dev 3.4 (measured: 0.6 and 3.3)."""
        if not self.kernels.joins_projections:
            return 0
        size = self._itemsize() * self._share("transformer")
        return int(int(self._sizes().get("num_layers", 8)) * 2 * 3 * self._width() ** 2 * size)

    def _remembered_bytes(self) -> int:
        """Keys and values of the references, in every block, which klein_kv keeps from the first step on."""
        if self.model.pipeline != "klein_kv":
            return 0
        sizes = self._sizes()
        blocks = int(sizes.get("num_layers", 8)) + int(sizes.get("num_single_layers", 48))
        return self.batch_size * self.reference_tokens * 2 * self._width() * self._itemsize() * blocks

    def _width(self) -> int:
        """Width of the transformer's hidden states; for a checkpoint only known by its path the widest there is."""
        sizes = self._sizes()
        return int(sizes.get("num_attention_heads", 48)) * int(sizes.get("attention_head_dim", 128))

    def _sizes(self) -> TransformerConfig:
        """The transformer's config; empty for a checkpoint that is only known by its path."""
        found = self._architecture()
        return found.transformer if found else {}

    def _architecture(self) -> Architecture | None:
        name = self.model.architecture
        return architecture(name, self.model.pipeline if name == "tiny" else None) if name else None

    def _largest_text_leaf(self, text: int) -> int:
        """Bytes of the text encoder's embedding table."""
        found = self._architecture()
        if found is None:
            return text // LARGEST_TEXT_LEAF
        return int(found.text["vocab_size"] * found.text["hidden_size"] * self._itemsize())

    def _itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2
