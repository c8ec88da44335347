"""``fluxrun --server ADDRESS …``: a run on a server, with the words, lines, folder and exit code of a plain one.

It imports neither torch nor Hydra (but to read a list of files), so that a picture is there in little more than the
time in which it is drawn.
"""

from __future__ import annotations

import http.client
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from fluxrun.errors import ConfigError, FluxrunError, Interrupted
from fluxrun.formatting import shorten, utf8
from fluxrun.paths import check_folders, expanded
from fluxrun.process.console import ConsoleHandler, Reporter, Steps, console
from fluxrun.process.signals import Interrupts
from fluxrun.serving.connection import PLAIN, Server, ServerError

log = logging.getLogger("fluxrun")

FLAG = "--server"

LISTS = ("reference_images", "lora.files")
"""Keys whose values name several files."""

ONE_FILE = ("image", "mask_image", "prompts_file")


def main(arguments: Sequence[str]) -> int:
    """Draw with a server; returns the exit code. What it does not do is refused in one line."""
    logging.basicConfig(level=logging.INFO, handlers=[ConsoleHandler()], force=True)
    try:
        check_folders()
        address, overrides = split(arguments)
        return Client(Server(address), Path.cwd()).draw(overrides)
    except KeyboardInterrupt:
        return _say(Interrupted("interrupted"))
    except FluxrunError as error:
        return _say(error)


def _say(error: FluxrunError) -> int:
    console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return error.exit_code


def split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The server's address and the overrides; raises ConfigError for what only a plain run does."""
    address, overrides, rest = "", [], iter(arguments)
    for word in rest:
        if word == FLAG or word.startswith(f"{FLAG}="):
            address = word.partition("=")[2] or next(rest, "")
        elif word.startswith("-"):
            raise ConfigError(f"{shorten(word)}: a server takes no flags; {PLAIN}")
        elif "=" not in word:
            raise ConfigError(f"{shorten(word)}: with --server there are overrides (key=value) only; {PLAIN}")
        elif word.lstrip("+~").startswith(("hydra.", "hydra/", "sweep.", "sweep=")):
            raise ConfigError(f"{shorten(word)}: a request sets keys and options of one run only; {PLAIN}")
        else:
            overrides.append(word)
    if not address:
        raise ConfigError(f"{FLAG} takes auto, http://HOST:PORT or unix:PATH")
    if wrong := next((word for word in overrides if word != utf8(word)), None):
        raise ConfigError(f"{utf8(wrong)} is not UTF-8")
    return address, overrides


class Client:
    """One run on a server, seen from here."""

    def __init__(self, server: Server, cwd: Path) -> None:
        now = datetime.now()
        self.server = server
        self.folder = cwd / "outputs" / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S-%f}"
        """Where a plain run would have put it."""
        self._said = ""
        """The last line above an ordinary one."""

    def draw(self, overrides: Sequence[str]) -> int:
        """Send the run, show it, fetch its folder; returns its exit code."""
        asked = [self._with_uploads(override) for override in overrides]
        run = str(self.server.ask("POST", "/api/runs", {"overrides": asked})["id"])
        with Interrupts(on_first=lambda: self._stop(run), on_second=lambda: self._stop(run)) as interrupts:
            ended = self._show(run)
        error = FluxrunError(str(ended["error"] or ""))
        error.exit_code = int(ended["exit_code"] or 0)
        if not self._fetch(run) and not error.exit_code:
            raise ServerError("the server has no record of the run", 0)
        if error.exit_code and str(error) not in self._said:
            raise error
        stopped_here = error.exit_code > 128 and interrupts.requested
        return interrupts.error().exit_code if stopped_here else error.exit_code

    # -- files --------------------------------------------------------------------------------------------------------

    def _with_uploads(self, override: str) -> str:
        """The override with uploads in the place of the files that it names."""
        key, _, value = override.partition("=")
        name = key.lstrip("+")
        if name in ONE_FILE and value not in ("", "null"):
            return f"{key}={self._upload(name, _unquoted(value))}"
        if name in LISTS and value not in ("", "null", "[]"):
            return f"{key}={written(self._uploaded(name, parsed(override)))}"
        return override

    def _uploaded(self, key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self._uploaded(key, entry) for entry in value]
        if isinstance(value, dict):
            return {**value, **({"path": self._upload(key, str(value["path"]))} if "path" in value else {})}
        return self._upload(key, str(value))

    def _upload(self, key: str, name: str) -> str:
        path = expanded(name)
        ending = path.suffix.lstrip(".").lower()
        try:
            with path.open("rb") as file:
                return str(self.server.ask("POST", f"/api/files?ending={ending[:20]}", file=file)["name"])
        except OSError as error:
            raise ConfigError(f"{key}: {name}: {error.strerror}; a server takes single files, else {PLAIN}") from error

    # -- what happens -------------------------------------------------------------------------------------------------

    def _stop(self, run: str) -> None:
        self.server.ask("DELETE", f"/api/runs/{run}")

    def _show(self, run: str) -> dict[str, Any]:
        """Show the run's lines and progress as a plain run would; returns its end."""
        reporter, shown, steps = Reporter(), ExitStack(), None
        with shown:
            for event in self._events(run):
                kind = event["event"]
                if kind in ("stage", "steps"):
                    shown.close()
                    steps = None
                if kind == "stage" and event["text"]:
                    shown.enter_context(reporter.timer(event["text"]))
                elif kind == "steps" and event["text"]:
                    steps = shown.enter_context(reporter.steps(event["text"], event["total"]))
                elif kind == "state" and event["state"] not in ("queued", "drawing"):
                    return event
                else:
                    self._show_one(event, run, steps)
        raise ServerError("the server went away before the run had ended", 0)

    def _events(self, run: str) -> Iterator[dict[str, Any]]:
        try:
            yield from self.server.events(f"/api/runs/{run}/events")
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"the server went away ({type(error).__name__})", 0) from error

    def _show_one(self, event: dict[str, Any], run: str, steps: Steps | None) -> None:
        if event["event"] == "line":
            level = logging.getLevelNamesMapping().get(event["level"].upper(), logging.INFO)
            text = event["text"].replace(f"runs/{run}", str(self.folder))
            self._said = text if level > logging.INFO else self._said
            log.log(level, "%s", text)
        elif event["event"] == "compiling" and steps:
            steps.compiling()
        elif event["event"] == "step" and steps:
            while steps.done < event["done"]:
                steps.advance()
        elif event["event"] == "state" and event.get("waiting"):
            log.info("%d request(s) before this one", event["waiting"])

    # -- the folder ---------------------------------------------------------------------------------------------------

    def _fetch(self, run: str) -> bool:
        """Copy the finished folder to where a plain run would have put it; False where it left none."""
        try:
            with self.server.open("GET", f"/api/runs/{run}/files/run.json") as answer:
                text = answer.read()
        except ServerError as error:
            if error.status == 404:
                return False
            raise
        record = json.loads(text)
        (self.folder / "images").mkdir(parents=True)
        images = record["images"]
        if listed := record.get("images_file"):
            self._fetch_file(run, str(listed))
            images = [json.loads(line) for line in (self.folder / str(listed)).read_bytes().splitlines()]
        for name in (*(str(image["path"]) for image in images), "fluxrun.log"):
            self._fetch_file(run, name)
        (self.folder / "run.json").write_bytes(text)  # last: what is in it is there
        return True

    def _fetch_file(self, run: str, name: str) -> None:
        path = self.folder / name
        if path.parent not in (self.folder, self.folder / "images"):
            raise ServerError(f"the server names a file outside of the run's folder: {shorten(name)}", 0)
        try:
            with self.server.open("GET", f"/api/runs/{run}/files/{name}") as answer, path.open("wb") as file:
                shutil.copyfileobj(answer, file)
        except ServerError as error:
            log.warning("%s is missing: %s", name, error)


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def parsed(override: str) -> Any:
    """A list of files as Hydra's grammar reads it."""
    from fluxrun.config.composition import parse_overrides

    value = parse_overrides([override])[0].value()
    if not isinstance(value, list | str):
        raise ConfigError(f"{shorten(override)}: must name files")
    return value


def written(value: Any) -> str:
    """A value in Hydra's grammar again."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {written(item)}' for key, item in value.items())}}}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value) if isinstance(value, int | float) else _quoted(str(value))


def _quoted(text: str) -> str:
    return "'" + text.replace("\\'", "\\\\'").replace("'", "\\'") + "'"
