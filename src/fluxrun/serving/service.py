"""What the routes share: the runs, the files, the rules and the ways in."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastapi import Request

from fluxrun.config.schema import RunConfig
from fluxrun.formatting import shorten
from fluxrun.hardware.detection import detect
from fluxrun.hardware.machine import Machine
from fluxrun.planning.prepare import prepare
from fluxrun.serving.catalogue import catalogue
from fluxrun.serving.guard import Access
from fluxrun.serving.history import History, prompt_of
from fluxrun.serving.limits import Limits
from fluxrun.serving.messages import RunStatus
from fluxrun.serving.rules import Accepted, Rules
from fluxrun.serving.runs import Run, Runs
from fluxrun.serving.uploads import Uploads


@dataclass(frozen=True)
class Settings:
    """How a server is started."""

    access: Access
    output: Path
    models: tuple[str, ...] = ("shapes", "tiny")
    limits: Limits = field(default_factory=Limits)
    idle_s: float | None = None
    """How long the worker stays without a request."""


class NoSuchThing(Exception):
    """An id or a file that is not there."""


class Service:
    """One server's parts."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.uploads = Uploads(settings.output / "uploads", settings.limits)
        self.rules = Rules(settings.models, settings.limits, self.uploads)
        self.runs = Runs(settings.output, self.rules, settings.limits.queue, settings.idle_s)
        self.history = History(settings.output / "runs")

    @cached_property
    def machine(self) -> Machine:
        """This machine, without torch."""
        machine = detect()
        return machine.on(machine.default_device())

    @cached_property
    def options(self) -> dict[str, Any]:
        """The catalogue, made once."""
        return catalogue(self.machine, list(self.settings.models))

    def plan(self, accepted: Accepted) -> dict[str, Any]:
        """What would run here, and why not the rest. Raises ConfigError or OptionUnavailable."""
        plan = prepare(RunConfig.from_dict(accepted.data, self.rules.dirs), self.machine).plan
        height, width = plan.size
        options = {group: choice.record().model_dump() for group, choice in plan.choices.items()}
        return {
            "height": height,
            "width": width,
            "steps": plan.steps_made,
            "device": plan.machine.device,
            "options": options,
            "notes": plan.notes,
        }

    def run(self, name: str) -> Run:
        """A run of this server; raises NoSuchThing."""
        found = self.runs.known.get(name)
        if found is None:
            raise NoSuchThing(f"no run {shorten(name, 40)!r} in this server's memory")
        return found

    def status(self, name: str) -> RunStatus:
        """A run of this server, or of an earlier one from its record; raises NoSuchThing."""
        record = self.history.record(name)
        known = self.runs.known.get(name)
        if known is not None:
            took = (known.ended_at or 0) - (known.started_at or 0) if known.started_at and known.ended_at else None
            return RunStatus(
                id=name, state=known.state, error=known.error, exit_code=known.exit_code, record=record, seconds=took,
                prompt=prompt_of(dict(known.accepted.data)), overrides=list(known.accepted.overrides),
                weights_loaded=known.weights_loaded,
            )  # fmt: skip
        if record is None:
            raise NoSuchThing(f"no run {shorten(name, 40)!r}")
        return _from_record(name, record)


def _from_record(name: str, record: dict[str, Any]) -> RunStatus:
    status, error, command = record.get("status"), record.get("error"), record.get("command")
    config = record.get("config")
    return RunStatus(
        id=name,
        state=status if status in ("completed", "failed", "interrupted") else "interrupted",
        error=str(error.get("message")) if isinstance(error, dict) else None,
        prompt=prompt_of(config if isinstance(config, dict) else {}),
        overrides=[str(word) for word in command[1:]] if isinstance(command, list) else [],
        record=record,
    )


def service_of(request: Request) -> Service:
    """The service behind a request."""
    found = request.app.state.service
    assert isinstance(found, Service)
    return found
