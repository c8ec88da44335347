"""The ``attention`` group: which kernel computes the transformer's attention, through diffusers' dispatcher."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from fluxrun.hardware.machine import Machine
from fluxrun.options.base import NOTHING_MORE, Context, Facts, Option, Workload
from fluxrun.trust import Closed, Open, OpenWhere
from fluxrun.types import Pipeline

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
    from torch._ops import OpOverload

TORCHS_OWN = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
"""Backends that are operators of torch's; FlexAttention is none: it asks for the compiler."""

TAKE_SHARES = frozenset({
    "native", "_native_cudnn", "_native_flash", "flash", "flash_hub", "_flash_3_hub", "sage", "sage_hub",
})  # fmt: skip
"""Backends that diffusers 0.42.1 registers with ``supports_context_parallel``, of those that options name."""

RETURN_LSE = TAKE_SHARES - {"native"}
"""Those of them that return the log-sum-exp, which a ring of GPUs needs."""

HUB = "a kernel from the kernels hub is code that is downloaded and run"


class AttentionOption(Option):
    """What is asked of every attention option."""

    in_fp8: ClassVar[bool] = False
    """Whether it takes queries, keys and values in float8."""

    @property
    def takes_shares(self) -> bool:
        """Whether it goes with a share of a picture's tokens on each of several GPUs."""
        return False

    @property
    def returns_lse(self) -> bool:
        """Whether it can also return the log-sum-exp of what it computes."""
        return False


class Attention(AttentionOption):
    """One attention backend of diffusers' dispatcher."""

    backend: Annotated[str, OpenWhere(r"(?!.*hub)\w+", HUB)]
    """Name of the backend in diffusers' attention dispatcher."""

    hub: Annotated[bool, Closed(HUB)] = False
    """Use the kernel from the kernels hub (``hub_backend``): downloads code when first used."""

    hub_backend: Annotated[str | None, Closed(HUB)] = None
    """diffusers' name for the same kernel from the kernels hub."""

    flash_impl: Annotated[str | None, OpenWhere(r"FA\d", "it names code that torch switches to")] = None
    """FlashAttention generation that torch's own flash backend is switched to (``FA4``)."""

    package: Open[str | None] = None
    """Distribution that must be installed."""

    package_minimum: Open[str | None] = None
    """Oldest usable version of ``package``."""

    needs_cuda: Open[bool] = False
    """Whether the kernel runs on NVIDIA GPUs only."""

    capability: Open[tuple[int, int] | None] = None
    """Lowest CUDA compute capability."""

    dtypes: Open[tuple[str, ...] | None] = None
    """Dtypes the kernel takes; None takes all."""

    @property
    def libraries(self) -> frozenset[str] | None:
        others = self.package or self.hub or self.flash_impl
        return NOTHING_MORE if self.backend in TORCHS_OWN and not others else None

    @property
    def needs_proof(self) -> bool:
        return bool(self.package or self.flash_impl)

    @property
    def takes_shares(self) -> bool:
        return self.effective_backend in TAKE_SHARES and not self.in_fp8

    @property
    def returns_lse(self) -> bool:
        return self.effective_backend in RETURN_LSE and not self.in_fp8

    @property
    def effective_backend(self) -> str:
        """The dispatcher's name of what is used, the hub's kernel included."""
        return self.hub_backend if self.hub and self.hub_backend else self.backend

    def requires(self, machine: Machine) -> str | None:
        if self.hub and not self.hub_backend:
            return "has no kernel on the kernels hub (attention.hub=false)"
        package = "kernels" if self.hub else self.package
        return (
            (machine.needs_cuda(self.capability) if self.needs_cuda else None)
            or (machine.lacks(package, None if self.hub else self.package_minimum) if package else None)
            or _unproven(self.name, machine)
        )

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """Switch every attention processor, then call the kernel once with the run's real shape.

        Facts: ``processors`` switched, ``shape`` [batch, tokens, heads, head size], ``kernel`` torch called.
        Raises what the kernel raises.
        """
        self._check_dtype(context.dtype)
        if self.flash_impl and not self.hub:
            context.state.activate_flash_attention(self.flash_impl)
        pipeline.transformer.set_attention_backend(self.effective_backend)
        processors = _processors_using(pipeline.transformer, self.effective_backend)
        if not processors:
            raise RuntimeError(f"no attention processor took the backend {self.effective_backend!r}")
        shape = attention_shape(pipeline.transformer, context)
        return {
            "processors": processors,
            "shape": list(shape),
            "kernel": _kernel(self.effective_backend, shape, context),
        }

    def prove(self, device: str) -> None:
        """Call the kernel once at head size 128."""
        import torch

        if self.flash_impl and not self.hub:
            torch.nn.attention.activate_flash_attention_impl(self.flash_impl)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        query, key, value = (torch.randn(1, 256, 2, 128, device=device, dtype=dtype) for _ in range(3))
        call_backend(self.effective_backend, query, key, value).sum().item()

    def _check_dtype(self, dtype: str) -> None:
        if self.dtypes and dtype not in self.dtypes:
            raise TypeError(f"takes {' or '.join(self.dtypes)}, the run's dtype is {dtype}")


class Fp8Attention(Attention):
    """Queries, keys, values and output in float8, by cuDNN; the fused kernels write them in that format."""

    in_fp8: ClassVar[bool] = True

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE  # cuDNN is called by fluxrun itself: diffusers knows nothing of it

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """Call cuDNN once with the run's real shape. Facts: as for the other kernels, and the call's first seconds."""
        self._check_dtype(context.dtype)
        pipeline.transformer.set_attention_backend(self.effective_backend)
        shape = attention_shape(pipeline.transformer, context)
        seconds = context.timed(lambda: _call_fp8(shape, context.device))
        return {
            "processors": _processors_using(pipeline.transformer, self.effective_backend),
            "shape": list(shape),
            "kernel": "cudnn sdpa_fp8",
            "plan_s": round(seconds, 2),
        }

    def prove(self, device: str) -> None:
        _call_fp8((1, 256, 2, 128), device)


class AutoAttention(AttentionOption):
    """Times the usable candidates with the run's own shape and takes the fastest."""

    candidates: Open[tuple[str, ...]] = ("sdpa", "cudnn", "flash3", "flash4", "flash", "xformers")
    """Options tried, in order; those this machine cannot use are left out."""

    repeats: Open[int] = Field(5, ge=1)
    """Timed calls per candidate; the median counts."""

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE

    @property
    def alternatives(self) -> tuple[str, ...]:
        return self.candidates

    @property
    def takes_shares(self) -> bool:
        return True  # it leaves out those that do not

    @property
    def returns_lse(self) -> bool:
        return True

    def choose(self, pipeline: Pipeline, context: Context) -> tuple[str, Facts]:
        """The fastest candidate and the probe's figures in milliseconds (or why a candidate was left out)."""
        shape = attention_shape(pipeline.transformer, context)
        times: dict[str, float] = {}
        left_out: dict[str, str] = {}
        for name in self.candidates:
            option = context.load_option("attention", name)
            reason = option.requires(context.machine) or _cannot_share(option, context.workload)
            try:
                if reason is None and isinstance(option, Attention):
                    times[name] = _measure(option, shape, context, self.repeats)
            except (RuntimeError, ValueError, TypeError, ImportError, NotImplementedError) as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if reason:
                left_out[name] = reason
        if not times:
            raise RuntimeError(f"no candidate could run: {left_out}")
        facts = {"probe_ms": times, "probe_shape": list(shape), "left_out": left_out}
        return min(times, key=times.__getitem__), facts


def attention_shape(transformer: Flux2Transformer2DModel, context: Context) -> tuple[int, int, int, int]:
    """[batch, tokens, heads, head size] of the single blocks' attention in this run: on several GPUs of one of them."""
    config, workload = transformer.config, context.workload
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    return (workload.batch_size, workload.tokens, max(1, heads // workload.ranks), size)


def _cannot_share(option: Option, workload: Workload) -> str | None:
    """Why a candidate does not go with the run's ``parallel`` option, or None."""
    if not isinstance(option, AttentionOption) or not workload.shares_tokens:
        return None
    if workload.needs_lse and not option.returns_lse:
        return "does not return the log-sum-exp, which parallel=ring needs"
    return None if option.takes_shares else "does not go with a share of the tokens on each GPU"


def _unproven(name: str, machine: Machine) -> str | None:
    """The remembered reason why a real call of this option's kernel failed here."""
    proof = machine.proven.get(f"attention={name}")
    return f"its kernel failed when probed here: {proof.reason}" if proof and proof.reason else None


def _processors_using(transformer: Flux2Transformer2DModel, backend: str) -> int:
    processors = (getattr(module, "processor", None) for module in transformer.modules())
    used = (getattr(processor, "_attention_backend", None) for processor in processors)
    return sum(1 for value in used if value is not None and value.value == backend)


def _inputs(shape: tuple[int, int, int, int], context: Context) -> list[torch.Tensor]:
    import torch

    generator = torch.Generator(context.device).manual_seed(0)
    dtype = getattr(torch, context.dtype)
    return [torch.randn(shape, generator=generator, device=context.device, dtype=dtype) for _ in range(3)]


def call_backend(backend: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One attention call through diffusers' dispatcher; [batch, tokens, heads, head size] in and out."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    return dispatch_attention_fn(query, key, value, backend=AttentionBackendName(backend))


def _call_fp8(shape: tuple[int, int, int, int], device: str) -> None:
    """One float8 attention of this shape through cuDNN."""
    import torch

    from fluxrun.kernels.transformer.fp8_attention import CudnnFp8Attention

    batch, tokens, heads, size = shape
    norm = torch.ones(size, device=device)
    attend = CudnnFp8Attention([norm], [norm])
    scales = attend.scales([torch.ones(batch * tokens, heads * size, device=device, dtype=torch.bfloat16)])
    q, k, v = (torch.zeros(shape, device=device).to(torch.float8_e4m3fn) for _ in range(3))
    attend(q, k, v, scales).float().sum().item()


def _kernel(backend: str, shape: tuple[int, int, int, int], context: Context) -> str:
    """Call the backend once and name the innermost attention operator that torch dispatched."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    names: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: OpOverload, types: Collection[type], args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    inputs = _inputs(shape, context)
    # FlexAttention traces itself with dynamo, which refuses to run under a dispatch mode.
    recorder = contextlib.nullcontext() if backend == "flex" else Recorder()  # type: ignore[no-untyped-call]  # torch's own
    with torch.no_grad(), recorder:
        call_backend(backend, *inputs)
    if backend == "flex":
        return "flex_attention"
    named = [name for name in names if "attention" in name or "flash" in name or "sage" in name]
    return named[-1] if named else "composed of plain matmuls"


def _measure(option: Attention, shape: tuple[int, int, int, int], context: Context, repeats: int) -> float:
    """Median milliseconds of one call, after one call that is not counted."""
    import statistics

    import torch

    option._check_dtype(context.dtype)
    with context.state.flash_attention(option.flash_impl if not option.hub else None), torch.no_grad():
        inputs = _inputs(shape, context)
        times = [context.timed(lambda: call_backend(option.effective_backend, *inputs)) for _ in range(repeats + 1)]
    return round(statistics.median(times[1:]) * 1e3, 4)
