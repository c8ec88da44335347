"""The Triton kernels of a plan, compiled on threads while its weights are loaded, and cuDNN's plan with them."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fluxrun.compilation.triton_artifacts import TritonArtifacts
from fluxrun.errors import one_line
from fluxrun.options.attention import AttentionOption
from fluxrun.options.base import Facts
from fluxrun.options.kernels import KernelsOption
from fluxrun.options.vae import FastVae, VaeOption
from fluxrun.paths import expanded
from fluxrun.planning.plan import Plan
from fluxrun.process import spans
from fluxrun.weights.location import Located
from fluxrun.weights.skeletons import skeleton

log = logging.getLogger("fluxrun.build")

Part = Callable[[], Any]


class KernelsAhead:
    """Compiles kernels in the background; what fails there is compiled, and fails, where it is first called."""

    def __init__(
        self, parts: list[Part], device: str, shared: TritonArtifacts | None = None, beside: Sequence[Part] = ()
    ) -> None:
        from fluxrun.kernels.ahead import Compilers

        self._shared, self._beside = shared, beside
        self.failed: str | None = None
        """Why it was given up."""
        self._device = torch.device(device)
        self._compilers = Compilers(self._device)
        self._thread = threading.Thread(target=self._compile, args=[parts], name="fluxrun-kernels", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all are compiled, or it was given up."""
        self._thread.join()

    def stop(self) -> None:
        """Begin to compile no other one."""
        self._compilers.shutdown(wait=False, cancel_futures=True)

    def share(self) -> Facts:
        """Add what was compiled to the file of ``compile.cache_artifacts``; what came from there and went there."""
        if self._shared is None:
            return {}
        from triton import JITFunction

        modules = [module for name, module in sys.modules.items() if name.startswith("fluxrun.kernels.")]
        self._shared.save(x for module in modules for x in vars(module).values() if isinstance(x, JITFunction))
        return {"triton_artifacts": dict(self._shared.facts)}

    def _compile(self, parts: list[Part]) -> None:
        from fluxrun.kernels.ahead import compile_ahead

        started = time.perf_counter()
        with spans.span("kernels"):
            try:
                compile_ahead(parts, self._compilers, self._device, self._beside)
            except Exception as error:  # whatever the compiler throws: it is said, and the first call tries again
                self.failed = one_line(error)
                log.debug("compiling kernels ahead failed", exc_info=error)
        log.debug("%d kernels compiled ahead in %.1f s", self._compilers.compiled, time.perf_counter() - started)
        self._compilers.shutdown(wait=False)


def begin(plan: Plan, located: Located) -> KernelsAhead | None:
    """Begin to compile what the plan's options will launch; None where they launch nothing of ours on a GPU.

    Imports here, in the caller's thread, what the background thread will use.
    """
    kernels = plan.option(KernelsOption, "kernels")
    if not (kernels.compile_ahead and plan.machine.device.startswith("cuda") and "triton" in plan.machine.packages):
        return None
    parts: list[Part] = []
    beside: list[Part] = []
    whole = plan.parallel.engine is None  # several processes launch other kernels, for a part of the heads or tokens
    if kernels.fused and plan.model.pipeline != "klein_kv" and whole:
        parts.append(_transformer(plan, located))
        if plan.option(AttentionOption, "attention").in_fp8:
            beside.append(_attention(plan, located))
    if isinstance(plan.option(VaeOption, "vae"), FastVae):
        parts.append(_decoder(plan, located))
    return KernelsAhead(parts, plan.machine.device, _shared(plan), beside) if parts else None


def _shared(plan: Plan) -> TritonArtifacts | None:
    if plan.compile.cache_artifacts is None:
        return None
    shared = TritonArtifacts(expanded(plan.compile.cache_artifacts), plan.machine)
    if note := shared.load():
        log.warning("%s", note)
        plan.note(note)
    return shared


def _transformer(plan: Plan, located: Located) -> Part:
    """One double and one single block at the run's sizes."""
    from fluxrun.kernels.transformer.rehearsal import Rehearsed, Shape, rehearse

    batch = plan.config.batch_size * (2 if plan.guidance_batched else 1)
    text = plan.model.max_sequence_length
    shape = Shape(batch, plan.estimate.tokens - text, text)
    in_fp8, quantization, dtype = plan.option(AttentionOption, "attention").in_fp8, plan.quantization, plan.dtype

    def part() -> None:
        blocks = {"num_layers": 1, "num_single_layers": 1}
        transformer: Any = skeleton(plan.model, located, "transformer", getattr(torch, dtype), blocks)
        if transformer is not None:
            quantized = quantization.chosen(transformer).values() if quantization.converts("transformer") else ()
            rehearse(transformer, Rehearsed(quantized=set(quantized), fp8_attention=in_fp8), shape, transformer.dtype)

    return part


def _attention(plan: Plan, located: Located) -> Part:
    """cuDNN's plan of float8 attention at the run's size."""
    from fluxrun.kernels.transformer.fp8_attention import prepare

    def part() -> None:
        blocks = {"num_layers": 0, "num_single_layers": 0}
        transformer: Any = skeleton(plan.model, located, "transformer", getattr(torch, plan.dtype), blocks)
        if transformer is not None:
            heads, size = transformer.config["num_attention_heads"], transformer.config["attention_head_dim"]
            prepare((plan.config.batch_size, plan.estimate.tokens, heads, size), torch.device(plan.machine.device))

    return part


def _decoder(plan: Plan, located: Located) -> Part:
    """What ``vae=fast`` decodes to compare itself; its kernels serve every size.

    On the device and not on meta: so its libraries for convolutions are awake, too.
    """
    from fluxrun.kernels.vae import triton_ops  # noqa: F401 - see begin
    from fluxrun.kernels.vae.decoder import TRIAL_SIZE, fast_decoder

    def part() -> None:
        vae: Any = skeleton(plan.model, located, "vae", getattr(torch, plan.dtype))
        if vae is not None:
            decoder = _materialized(vae.decoder, plan.machine.device)
            weight = decoder.conv_in.weight
            fast_decoder(decoder, plan.machine.device)(weight.new_zeros(1, weight.shape[1], TRIAL_SIZE, TRIAL_SIZE))

    return part


def _materialized(module: Any, device: str) -> Any:
    """A module of the meta device with memory for its weights. Not ``to_empty``, which imports sympy."""
    state = module.state_dict()
    module.load_state_dict(
        {name: torch.empty(value.shape, dtype=value.dtype, device=device) for name, value in state.items()}, assign=True
    )
    return module
