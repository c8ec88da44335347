"""Prompt embeddings: encoded once per prompt, kept while images still need them; with staged memory before all else."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fluxrun.pipeline.weights_loader import WeightsLoader
from fluxrun.process import spans
from fluxrun.process.clock import DeviceClock, Mark
from fluxrun.process.console import Reporter
from fluxrun.process.device import is_lost
from fluxrun.process.signals import Interrupts
from fluxrun.types import Pipeline
from fluxrun.weights.shells import shell

log = logging.getLogger("fluxrun.build")


class Encoded(NamedTuple):
    """A text that the device was given to encode, when it was begun and when it is there."""

    text: str
    clock: DeviceClock
    begun: Mark
    ended: Mark


class PromptEncoder:
    """The embeddings of one run's prompts, over one session's weights.

    With staged memory the text encoder is loaded alone, encodes every prompt and goes before the rest is loaded; its
    embeddings stay in the weight store, so that a sweep encodes each prompt once.
    """

    def __init__(self, loader: WeightsLoader) -> None:
        self._loader = loader
        self._known: dict[str, torch.Tensor] = {}
        self._texts: Sequence[str] = ()
        self._on_encoded: Callable[[], None] = lambda: None
        self._on_timed: Callable[[float], None] = lambda seconds: None
        self._untold: list[Encoded] = []
        """This call's texts: the device may still be at them."""
        self._ahead: list[Encoded] = []
        """The next call's."""
        self.upcoming: Sequence[str] = ()
        """Prompts of later runs over the same weights: staged memory encodes them while its text encoder is there."""
        self.counts: Counter[str] = Counter()
        """Staged memory: prompts encoded first, and known before; bytes freed."""

    @property
    def staged(self) -> bool:
        """Whether prompts are encoded first, with the text encoder alone."""
        return self._loader.plan.memory.staged

    def begin(self, texts: Sequence[str], on_encoded: Callable[[], None], on_timed: Callable[[float], None]) -> None:
        """Begin a run that needs these texts.

        ``on_encoded`` is called when the device has been given a text to encode, ``on_timed`` gets the seconds of each
        one, in ``tell_times``.
        """
        self._texts, self._on_encoded, self._on_timed = list(texts), on_encoded, on_timed
        self._known.clear()
        self._untold.clear()
        self._ahead.clear()

    def knows(self, texts: Iterable[str]) -> bool:
        """Whether staged memory's embeddings of all of them are in the store."""
        return all(self._stored(text) is not None for text in texts)

    def of(self, texts: Sequence[str], pipeline: Pipeline, clock: DeviceClock) -> torch.Tensor:
        """Embeddings of a batch: [batch, max_sequence_length, joint_attention_dim], on the run's device.

        The device may still be at it: what it is given next lines up behind.
        """
        self._untold += self._ahead
        self._ahead.clear()
        self._encode_missing(texts, pipeline, clock, self._untold)
        return torch.cat([self._known[text].to(self._device) for text in texts])

    def encode_ahead(self, texts: Sequence[str], pipeline: Pipeline, clock: DeviceClock) -> None:
        """Give the device a later batch's texts. What they took is told after the next call."""
        self._encode_missing(texts, pipeline, clock, self._ahead)

    @property
    def has_begun_the_next(self) -> bool:
        """Whether the device may still be encoding what ``encode_ahead`` gave it."""
        return bool(self._ahead)

    def encode_first(self, reporter: Reporter, interrupts: Interrupts) -> None:
        """Staged memory: every text that is not known yet, with the text encoder alone, which is then freed."""
        missing = [text for text in self._texts if not self._has(text)]
        if not missing:
            return
        # The text encoder is loaded once more for each run that misses one: a sweep's later prompts go along.
        later = [text for text in dict.fromkeys(self.upcoming) if text not in missing and self._stored(text) is None]
        base = self._loader.load("text", reporter, interrupts)
        pipeline = shell(base)
        clock = DeviceClock(self._device)
        for text in (*missing, *later):
            with interrupts.immediate():
                self._known[text] = self._encode(pipeline, text, clock, self._untold)
            self._loader.store.embeddings[self._key(text)] = self._known[text].cpu()
        self.tell_times()
        self.counts |= Counter(prompts_encoded_first=len(missing) + len(later), freed_bytes=base.bytes)
        del pipeline, base
        self._loader.store.keep_only([])

    def tell_times(self) -> None:
        """Tell what each text took. Waits for the device to have encoded them, and for nothing after that."""
        told, self._untold = self._untold, []
        try:
            for _, clock, begun, ended in told:
                spans.add("encode", clock.at(begun), clock.at(ended))
                self._on_timed(clock.at(ended) - clock.at(begun))
        except RuntimeError:
            if not is_lost(self._device):  # one that is lost has no times any more
                raise

    def forget(self, texts: Iterable[str]) -> None:
        """Drop what no later image needs, so that ten thousand prompts do not fill the memory."""
        if not self.staged:
            for text in texts:
                self._known.pop(text, None)

    def forget_ahead(self) -> None:
        """Drop what was encoded ahead: under the options that follow, the text encoder may be another one."""
        self.forget(encoded.text for encoded in self._ahead)
        self._ahead.clear()

    def forget_not_finite(self) -> None:
        """Drop embeddings with values that are no numbers: under other options the text encoder may do better."""
        for known in (self._known, self._loader.store.embeddings):
            for key in [key for key, embeds in known.items() if not torch.isfinite(embeds).all()]:
                del known[key]

    # -- one text -----------------------------------------------------------------------------------------------------

    def _encode_missing(
        self, texts: Sequence[str], pipeline: Pipeline, clock: DeviceClock, encoded: list[Encoded]
    ) -> None:
        for text in texts:
            if not self._has(text):
                self._known[text] = self._encode(pipeline, text, clock, encoded)

    @property
    def _device(self) -> str:
        return self._loader.plan.machine.device

    def _has(self, text: str) -> bool:
        """Whether this run knows the text's embedding, or an earlier one with staged memory has left it."""
        if text not in self._known and self.staged and (found := self._stored(text)) is not None:
            self._known[text] = found
            self.counts["prompts_known_before"] += 1
        return text in self._known

    def _stored(self, text: str) -> torch.Tensor | None:
        return self._loader.store.embeddings.get(self._key(text))

    def _key(self, text: str) -> str:
        model = self._loader.plan.model
        key, quantization = self._loader.key("text"), self._loader.plan.quantization
        # Neither is the text encoder's, unless it is quantized, too.
        weights = replace(
            key, quantization=key.quantization if quantization.converts("text_encoder") else "", distilled=None
        )
        return f"{weights} {model.max_sequence_length} {model.text_encoder_out_layers} {text}"

    def _encode(self, pipeline: Pipeline, text: str, clock: DeviceClock, encoded: list[Encoded]) -> torch.Tensor:
        model = self._loader.plan.model
        arguments: dict[str, Any] = {"max_sequence_length": model.max_sequence_length}
        if model.text_encoder_out_layers:
            arguments["text_encoder_out_layers"] = model.text_encoder_out_layers
        begun = clock.mark()
        with torch.no_grad():
            # The device as the plan has it: diffusers looks for it in all modules of all models, 2 ms of a picture.
            embeds, _ = pipeline.encode_prompt(text, device=torch.device(self._device), **arguments)
        encoded.append(Encoded(text, clock, begun, clock.mark()))
        self._on_encoded()
        return embeds
