"""memory=resident: where the pipeline computes is known, and stays true when somebody moves its models later."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import small

from fluxrun.pipeline.session import Session
from fluxrun.runner import build


@pytest.fixture
def session() -> Iterator[Session]:
    """A pipeline as it is handed out."""
    with build(small("memory=resident")) as built:
        yield built


def counted(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Modules that are walked through from now on."""
    walked: list[object] = []
    modules = torch.nn.Module.modules

    def noted(self: object) -> object:
        walked.append(self)
        return modules(self)

    monkeypatch.setattr(torch.nn.Module, "modules", noted)
    return walked


def test_the_device_is_known_without_a_look_at_every_module(session, monkeypatch) -> None:
    walked = counted(session, monkeypatch)
    assert session.pipeline._execution_device == torch.device("cpu")
    assert walked == []
    session.pipeline.transformer.to("meta")
    assert session.pipeline._execution_device == torch.device("meta")


def test_diffusers_looks_itself_where_models_have_been_given_hooks(session, monkeypatch) -> None:
    from accelerate import cpu_offload_with_hook

    walked = counted(session, monkeypatch)
    for model in (session.pipeline.text_encoder, session.pipeline.vae, session.pipeline.transformer):
        cpu_offload_with_hook(model, torch.device("meta"))
    assert session.pipeline._execution_device == torch.device("meta")
    assert walked


def test_it_is_still_the_class_that_diffusers_knows(session, tmp_path) -> None:
    from diffusers import Flux2KleinPipeline

    assert isinstance(session.pipeline, Flux2KleinPipeline)
    assert (type(session.pipeline).__name__, type(session.pipeline).__module__) == (
        Flux2KleinPipeline.__name__, Flux2KleinPipeline.__module__,
    )  # fmt: skip
    session.pipeline.save_pretrained(tmp_path)
    assert type(Flux2KleinPipeline.from_pretrained(tmp_path)) is Flux2KleinPipeline
