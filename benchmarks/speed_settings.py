"""What ``speed.py`` compares: plain diffusers recipes and fluxrun settings, by section. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

REFERENCE = "plain"
"""Plain diffusers, eager: what every ratio and every error is taken against."""


@dataclass(frozen=True)
class Setting:
    """One thing to measure: a plain diffusers recipe (``speed_plain``), or fluxrun with overrides."""

    name: str
    overrides: tuple[str, ...] = ()
    recipe: str | None = None
    """A recipe of ``speed_plain.RECIPES``; None is fluxrun."""
    needs: tuple[str, ...] = ()
    """Modules a recipe cannot do without: where one is missing, the setting is left out and that is said."""
    images: int = 0
    """Images to time where a section's own number would take too long (0: the section's)."""

    @property
    def halves(self) -> bool:
        """Whether its transformer is held in 8 bits."""
        return "fp8" in f"{self.name} {self.recipe} {' '.join(self.overrides)}" or "h100_fast" in str(self.overrides)

    def gigabytes(self, bf16: float) -> float:
        """Estimated GPU memory beside others: ``bf16`` GB, less 40 % where the transformer is held in 8 bits."""
        return 0.6 * bf16 if self.halves else bf16


def plain(recipe: str, *needs: str, name: str = "", images: int = 0) -> Setting:
    """Plain diffusers with a recipe applied."""
    return Setting(name or f"plain_{recipe}", recipe=recipe, needs=needs, images=images)


def fluxrun(name: str, *overrides: str) -> Setting:
    """fluxrun with these overrides."""
    return Setting(name, overrides)


PLAIN = plain("eager", name=REFERENCE)
LOSSLESS = fluxrun("h100_lossless", "+preset=h100_lossless")
FAST = fluxrun("h100_fast", "+preset=h100_fast")
FIXED_CACHE = ("cache=fixed", "cache.compute=0.5")

KLEIN = (
    (PLAIN, plain("regional"), fluxrun("neutral"), LOSSLESS, FAST, plain("flux_fast")),
    (
        PLAIN,
        fluxrun("cudagraphs", "compile=cudagraphs"),
        fluxrun("fused", "kernels=fused"),
        fluxrun("fused_cudagraphs", "kernels=fused", "compile=cudagraphs"),
        fluxrun("regional_cuda_graph", "compile=regional", "compile.cuda_graph=true"),
        fluxrun("fp8_regional", "quantization=fp8", "compile=regional"),
        fluxrun("fp8_fused_cudagraphs", "quantization=fp8", "kernels=fused", "compile=cudagraphs"),
    ),
    (
        PLAIN,
        fluxrun("regional", "compile=regional"),
        plain("flux_fast_fp8", "torchao"),
        plain("cache_dit", "cache_dit"),
        fluxrun("whole_graph", "compile=default"),
    ),
)
"""Groups measured side by side, in order of importance; each has plain diffusers in it."""

DEV = (PLAIN, plain("regional"), LOSSLESS, FAST)
IMAGE = (PLAIN, plain("regional"), LOSSLESS, FAST)
VAE_COMPILED = ("compile=regional", "compile.targets=[vae_decoder]", "vae.channels_last=true")
VAE = (
    PLAIN,
    LOSSLESS,
    FAST,
    fluxrun("neutral"),
    plain("vae_compiled"),
    fluxrun("vae_compile", *VAE_COMPILED),
    fluxrun("vae_compile_cuda_graph", *VAE_COMPILED, "compile.cuda_graph=true"),
)
LONG = (
    replace(FAST, name="h100_fast_fixed_cache", overrides=(*FAST.overrides, *FIXED_CACHE)),
    replace(PLAIN, images=1),
)
SIZES = (FAST, fluxrun("regional", "compile=regional"))
FIRST_IMAGE = (LOSSLESS, FAST, fluxrun("neutral"))

SIZE_SWEEP = ((512, 512), (768, 1360), (1024, 1024), (1536, 1536), (2048, 2048))
"""Height and width in pixels; one is not square."""


@dataclass(frozen=True)
class MemoryRow:
    """A model under a limit on the GPU's memory, drawn by one ``fluxrun`` process."""

    name: str
    model: str
    budget_gb: float
    overrides: tuple[str, ...]
    steps: int = 4
    plain: bool = False
    """Plain diffusers with ``enable_model_cpu_offload`` instead; overrides choose the model only."""
    seconds: float = 150
    """The longest it may take."""

    @property
    def key(self) -> str:
        """What ``--keep`` calls it: commas separate names there."""
        return self.name.replace(",", "")


RTX_4090 = "+preset=rtx4090_24gb"
PLAIN_OFFLOAD = "plain diffusers' model offload"

MEMORY = (
    MemoryRow("klein-9B bf16, auto", "klein_9b", 24, ("memory=auto", "memory.budget_gb=24")),
    MemoryRow("dev fp8, preset rtx4090_24gb", "dev", 24, (RTX_4090,), steps=8),
    MemoryRow("dev bf16, staged", "dev", 80, ("memory=staged", "kernels=fused"), steps=8),
    MemoryRow(f"klein-9B bf16, {PLAIN_OFFLOAD}", "klein_9b", 24, (), plain=True),
    MemoryRow("dev fp8, group", "dev", 24, ("memory=group", "quantization=fp8"), steps=8),
    MemoryRow("klein-9B bf16, group", "klein_9b", 12, ("memory=group",)),
    MemoryRow("klein-9B bf16, auto", "klein_9b", 12, ("memory=auto", "memory.budget_gb=12", "kernels=fused")),
    MemoryRow("klein-4B bf16, auto", "klein_4b", 12, ("memory=auto", "memory.budget_gb=12")),
    MemoryRow("klein-9B bf16, staged", "klein_9b", 24, ("memory=staged",)),
    MemoryRow("klein-9B bf16, balanced", "klein_9b", 24, ("memory=balanced",)),
    MemoryRow("klein-9B bf16, group", "klein_9b", 24, ("memory=group",)),
    MemoryRow("dev bf16, auto", "dev", 48, ("memory=auto", "memory.budget_gb=48", "kernels=fused"), steps=8),
    MemoryRow("dev bf16, balanced", "dev", 80, ("memory=balanced",), steps=8),
    MemoryRow(f"dev bf16, {PLAIN_OFFLOAD}", "dev", 80, (), steps=8, plain=True, seconds=300),
)

MODELS: dict[str, tuple[str, ...]] = {
    "klein_4b": ("model=flux2_klein_4b", "model.weights=random"),
    "klein_9b": ("model=flux2_klein_9b", "model.weights=random"),
    "dev": ("model=flux2_dev", "model.weights=random"),
}
TINY = ("model=tiny", "height=64", "width=64", "model.max_sequence_length=32")
TINY_MODELS: dict[str, tuple[str, ...]] = {
    name: (*TINY, "model.pipeline=dev") if name == "dev" else TINY for name in MODELS
}
"""What stands for each model in a dry run: its pipeline class, nothing of its size."""

KLEIN_GB = 12.0
"""GPU memory of one process with klein-4B's transformer and VAE in bf16, CUDA context and graphs included."""
TEXT_ENCODER_GB = 8.0
"""klein-4B's text encoder beside it."""


def chosen(settings: Iterable[Setting], keep: Sequence[str] | None) -> tuple[Setting, ...]:
    """Those named in ``keep`` (None: all), and always the reference."""
    return tuple(s for s in settings if keep is None or s.name in keep or s.name == REFERENCE)


def parse_setting(text: str) -> Setting:
    """``name: override override …`` as a setting."""
    name, colon, overrides = text.partition(":")
    if not colon or not name.strip():
        raise ValueError(f"{text!r} is not 'name: override …'")
    return fluxrun(name.strip(), *overrides.split())
