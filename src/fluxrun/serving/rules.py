"""What a request may set: a stranger's words, judged before, while and after they are composed."""

from __future__ import annotations

import copy
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fluxrun.config.catalog import Catalog
from fluxrun.config.composition import RAW_TEXT_KEYS, compose_node, config_dirs, hydra_for, quote_raw_text, to_data
from fluxrun.config.origin import first_closed
from fluxrun.config.prompts import jobs_of
from fluxrun.config.schema import BESIDE_A_RUN, GROUPS, RunConfig
from fluxrun.errors import ConfigError, TrustError
from fluxrun.formatting import counted, nearest, shorten, utf8
from fluxrun.options.model import Flux2Model
from fluxrun.paths import expanded
from fluxrun.serving.limits import Limits
from fluxrun.trust import interpolation_beyond_config
from fluxrun.types import JsonObject

KEY = re.compile(r"\+{0,2}[A-Za-z]\w*(\.[A-Za-z]\w*)*")
"""A key of the config, added or not: no package (``@``), no deletion, nothing that begins with an underscore."""

OPTION_NAME = re.compile(r"[\w-]+")

FILES = ("prompts_file", "image", "mask_image", "reference_images")
"""Keys whose values name files; ``lora.files`` is the other one."""

MOST_COMPOSED = 64


class Files(Protocol):
    """The files that a request may name."""

    @property
    def schemes(self) -> tuple[str, ...]:
        """What such a name begins with."""
        ...

    def path(self, name: str) -> Path:
        """The file of a name that begins so; raises ConfigError where there is none."""
        ...


@dataclass(frozen=True)
class Wording:
    """How a refusal names who asks, whom, and what to do about it."""

    asker: str = "a request"
    owner: str = "this server"
    models: str = "add it to --models"
    files: str = "POST /api/files takes files"
    limit: str = "--limit {name}=…"
    instead: str = "run without --server"


@dataclass(frozen=True)
class Accepted:
    """A request that may be drawn: what was typed, and the composed config as plain data."""

    overrides: tuple[str, ...]
    data: JsonObject
    images: int


class Rules:
    """Models from a list, named files instead of paths, open keys only, and limits.

    Nothing here looks at ``--trust-config``: a request is never trusted.
    """

    def __init__(self, models: Sequence[str], limits: Limits, files: Files, wording: Wording | None = None) -> None:
        self.dirs = config_dirs()
        self.models: dict[str, tuple[str, str | None]] = {}
        self.add_models(models)
        self._limits, self._files, self._say = limits, files, wording or Wording()
        self._composing = threading.Lock()
        self._composed: OrderedDict[tuple[str, ...], JsonObject] = OrderedDict()

    def add_models(self, names: Sequence[str]) -> None:
        """Draw with these, too: options, folders or hub ids. Raises ConfigError for a name that is none of them."""
        self.models |= {name: _listed(name) for name in names if name not in self.models}

    def check(self, overrides: Sequence[str]) -> Accepted:
        """Compose a request's overrides; raises ConfigError or TrustError in one line for what it may not ask for."""
        if len(overrides) > self._limits.overrides:
            raise ConfigError(f"{self._say.asker} has {len(overrides)} overrides, {self._limits.overrides} is the most")
        for override in overrides:
            self._check_text(override)
        data = self._compose(overrides)
        closed = self._take_files(data)
        config = RunConfig.from_dict(data, self.dirs)
        closed += self._check_model(config.model)
        if found := first_closed(_without(data, closed)):
            raise self._refusal(f"set {found[0]!r}: {found[1]}")
        return Accepted(tuple(overrides), data, self._check_size(config))

    def _refusal(self, what: str, remedy: str = "") -> TrustError:
        return TrustError(f"{self._say.asker} may not {what}; {remedy and f'{remedy}, or '}{self._say.instead}")

    # -- texts --------------------------------------------------------------------------------------------------------

    def _check_text(self, override: str) -> None:
        if override != utf8(override):
            raise ConfigError(f"{shorten(override, 40)} is no text: it holds half a character")
        key, equals, value = override.partition("=")
        name = key.lstrip("+")
        is_text = name in RAW_TEXT_KEYS and quote_raw_text(override) != override
        most = self._limits.prompt_length if is_text else self._limits.override_length
        if len(override) > most:
            raise ConfigError(
                f"{shorten(override, 40)}: an override of {len(override):,} characters, {most:,} is the most"
            )
        if not equals or not KEY.fullmatch(key) or name.split(".")[0] in BESIDE_A_RUN:
            raise self._refusal(f"set {shorten(key)!r}, only keys and options of one run")
        if (name in GROUPS or name == "preset") and not OPTION_NAME.fullmatch(value):
            raise ConfigError(f"{shorten(override)}: takes the name of an option")
        if not is_text and (beyond := interpolation_beyond_config(value.replace("\\", ""))):
            raise self._refusal(f"set {name!r} to {shorten(beyond)!r}: ${{…}} may only name another key of the config")

    # -- composing ----------------------------------------------------------------------------------------------------

    def _compose(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The composed data. What changes from request to request (prompt, seed, steps) is set without Hydra."""
        plain, rest = _plain_values(overrides)
        with self._composing:  # Hydra keeps its state in the process
            if rest not in self._composed:
                self._composed[rest] = self._by_hydra(rest)
                if len(self._composed) > MOST_COMPOSED:
                    self._composed.popitem(last=False)
            self._composed.move_to_end(rest)
            return {**copy.deepcopy(dict(self._composed[rest])), **plain}

    def _by_hydra(self, overrides: Sequence[str]) -> JsonObject:
        try:
            with hydra_for(self.dirs) as hydra:
                return to_data(compose_node(hydra, [quote_raw_text(o) for o in overrides], self.dirs))
        except RecursionError as error:
            raise ConfigError("a value leads back to itself, or is nested too deep") from error

    # -- files --------------------------------------------------------------------------------------------------------

    def _take_files(self, data: dict[str, Any]) -> list[str]:
        """Put the files themselves in the place of their names; returns the keys that are right now, though closed."""
        taken = []
        for key in FILES:
            value = data.get(key)
            if value in (None, []):
                continue
            names = value if isinstance(value, list) else [value]
            paths = [str(self._file(key, name)) for name in names]
            data[key] = paths if isinstance(value, list) else paths[0]
            taken.append(key)
        lora = data.get("lora")
        if isinstance(lora, dict) and isinstance(lora.get("files"), list) and lora["files"]:
            lora["files"] = [self._lora_file(entry) for entry in lora["files"]]
            taken.append("lora.files")
        return taken

    def _lora_file(self, entry: Any) -> dict[str, Any]:
        given = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(given, dict) or not given.keys() <= {"path", "bundled", "scale"}:
            raise self._refusal("set more of an entry of lora.files than path, bundled and scale")
        return {**given, **({"path": str(self._file("lora.files", given["path"]))} if "path" in given else {})}

    def _file(self, key: str, name: Any) -> Path:
        if not isinstance(name, str) or not name.startswith(self._files.schemes):
            raise self._refusal(f"set {key!r} to {shorten(name)!r}: it names a file", self._say.files)
        return self._files.path(name)

    # -- what it asks for ---------------------------------------------------------------------------------------------

    def _check_model(self, model: Flux2Model) -> list[str]:
        """Refuse a model that is not listed; returns the closed keys by which a listed one is named."""
        if (model.source(), model.revision) not in self.models.values():
            raise TrustError(
                f"model={model.name} ({shorten(model.source())}): {self._say.owner} draws with "
                f"{', '.join(self.models)}; {self._say.models}, or {self._say.instead}"
            )
        if model.weights == "random" or (model.bundled and not model.path):
            return []
        return ["model.path"] if model.path else ["model.id", "model.revision"]

    def _check_size(self, config: RunConfig) -> int:
        limits, images = self._limits, len(jobs_of(config))
        images *= config.measure.repeats
        images += config.measure.warmup * config.batch_size
        pixels = (config.height or config.model.height) * (config.width or config.model.width) * config.batch_size
        steps = max(config.steps or 0, config.model.steps or 0)
        asked = {"images": (images, limits.images), "pixels": (pixels, limits.pixels), "steps": (steps, limits.steps)}
        for name, (count, most) in asked.items():
            if count > most:
                raise ConfigError(
                    f"{self._say.asker} for {counted(count)} {name}: the limit is {most:,}"
                    + (f" ({self._say.limit.format(name=name)})" if self._say.limit else "")
                )
        return images


def _plain_values(overrides: Sequence[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Values that need no grammar to be read, each given once, and the overrides that are left."""
    keys = [override.partition("=")[0].lstrip("+") for override in overrides]
    plain: dict[str, Any] = {}
    rest = []
    for override in overrides:
        key, _, text = override.partition("=")
        if keys.count(key) == 1 and key in ("prompt", "negative_prompt") and quote_raw_text(override) != override:
            plain[key] = text
        elif keys.count(key) == 1 and key in ("seed", "steps") and re.fullmatch(r"[1-9][0-9]{0,17}|0", text, re.ASCII):
            plain[key] = int(text)
        else:
            rest.append(override)
    return plain, tuple(rest)


def _listed(name: str) -> tuple[str, str | None]:
    """What a name of the list stands for, as a model's ``source`` and revision: an option, a folder or a hub id."""
    catalog = Catalog()
    if name in catalog.names("model") and name != "local":
        option = catalog.load("model", name)
        assert isinstance(option, Flux2Model)
        return option.source(), option.revision
    folder = expanded(name)
    if folder.is_dir():
        return str(folder.resolve()), None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return f"hub {name}", None
    raise ConfigError(
        f"--models {name}: no model option, no folder and no hub id; {nearest(name, catalog.names('model'))}"
    )


def _without(data: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The data without some keys, dotted ones among them."""
    kept = {key: value for key, value in data.items() if key not in keys}
    for key in keys:
        group, _, knob = key.partition(".")
        if knob and isinstance(kept.get(group), Mapping):
            kept[group] = {name: value for name, value in kept[group].items() if name != knob}
    return kept
