"""``fluxrun rerun``: a run, or one image of it, again from what was recorded with it."""

from __future__ import annotations

import logging
import logging.config
import os
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from fluxrun.config.origin import check_recorded
from fluxrun.config.schema import RunConfig
from fluxrun.errors import ConfigError, exit_code_of
from fluxrun.options.base import option_class
from fluxrun.paths import expanded
from fluxrun.pictures import open_picture
from fluxrun.planning.libraries import libraries_of
from fluxrun.planning.prepare import prepare
from fluxrun.process.console import log_to
from fluxrun.reading import Unreadable
from fluxrun.record.claiming import claimed
from fluxrun.record.folder import read_record
from fluxrun.record.picture import pixel_hash, read_metadata
from fluxrun.record.schema import InputRecord, RunRecord
from fluxrun.record.signature import is_own
from fluxrun.runner import run
from fluxrun.startup.lean import start_lean
from fluxrun.trust import trusted
from fluxrun.types import JsonObject

log = logging.getLogger("fluxrun.rerun")


def command(arguments: Sequence[str]) -> int:
    """``fluxrun rerun IMAGE|RUN_FOLDER [hydra.run.dir=FOLDER]``: draw the same pixels again, and say if they are."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(command.__doc__)
        return 0 if arguments else 2
    return rerun(arguments[0], arguments[1:])


def rerun(target: str, overrides: Sequence[str] = ()) -> int:
    """Draw ``target`` (an image or a run folder) again into a new folder; returns the exit code.

    A recorded config that this user's key did not sign is under the trust rule like any stranger's file. Raises
    ConfigError for a target that is not one of fluxrun's.
    """
    path = expanded(target)
    config, hashes = from_folder(path) if os.path.isdir(path) else from_image(path)
    folder = output_dir(overrides)
    prepared = prepare(config)
    inputs = prepared.inputs
    start_lean(libraries_of(prepared))
    with claimed(folder):
        log_to(folder)
        try:
            _warn_of_other_inputs(path, inputs)
            record = run(config, folder, command=["fluxrun", "rerun", target, *overrides])
        except Exception as error:  # already one line on screen and a traceback in the log
            return exit_code_of(error)
    return 0 if _compare(record, hashes) else 1


def from_folder(folder: Path) -> tuple[RunConfig, list[str]]:
    """A whole run's config and its images' pixel hashes."""
    record = read_record(folder)
    if not _is_own(record):
        check_recorded(record.config, f"the record in {folder}")
    config = with_found_paths(record.config, record.cwd)
    return RunConfig.from_dict(config), [image.sha256 for image in record.images]


def from_image(path: Path) -> tuple[RunConfig, list[str]]:
    """One image's config: its own prompt and seed, nothing else of its run."""
    if not os.path.exists(path):
        raise ConfigError(f"{path}: no such image or run folder")
    metadata = read_metadata(path)
    if not is_own(metadata["config"], metadata.get("signature")):
        check_recorded(metadata["config"], f"the config in {path}")
    config: dict[str, Any] = dict(metadata["config"])
    own = {"prompt": metadata.get("prompt"), "seed": metadata.get("seed"), "prompts_file": None, "num_images": 1}
    # A batch is numerically not the same as one image at a time, but the other images are not known here.
    config |= {**own, "batch_size": 1, "measure": {"warmup": 0, "repeats": 1}}
    if os.path.isfile(path.parent.parent / "run.json"):  # the image is where its run left it
        record = read_record(path.parent.parent)
        config = with_found_paths(config, record.cwd) if _is_own(record) or trusted() else config
    return RunConfig.from_dict(config), [_pixels(path)]


def _is_own(record: RunRecord) -> bool:
    return is_own(record.config, record.signature, record.cwd or "")


def _pixels(path: Path) -> str:
    try:
        with open_picture(path) as image:
            return pixel_hash(image)
    except Unreadable as error:
        raise ConfigError(f"{path} {error}") from error


def with_found_paths(config: JsonObject, cwd: str | None) -> dict[str, Any]:
    """``config`` with relative paths that are not there from here, but are from where the run was started."""

    def found(value: Any) -> Any:
        if isinstance(value, list):
            return [found(entry) for entry in value]
        if not isinstance(value, str) or cwd is None or os.path.exists(expanded(value)):
            return value
        return str(Path(cwd) / value) if os.path.exists(Path(cwd) / value) else value

    return _with_paths(config, RunConfig, found)


def _with_paths(data: JsonObject, model: type[BaseModel], change: Callable[[Any], Any]) -> dict[str, Any]:
    """``data`` with whatever its schema says is a path changed; an option's schema is that of its class."""
    result = dict(data)
    for name, field in model.model_fields.items():
        value = data.get(name)
        if _is_path(field.annotation):
            result |= {name: change(value)} if name in data else {}
        elif isinstance(value, dict) and "_target_" in value:
            result[name] = _with_paths(value, option_class(str(value["_target_"])), change)
        elif isinstance(value, list) and (entry := _entry_of(field.annotation)):
            result[name] = [_with_paths(one, entry, change) if isinstance(one, dict) else change(one) for one in value]
    return result


def _entry_of(annotation: Any) -> type[BaseModel] | None:
    """The schema of a list's entries, where they have one: a LoRA file's."""
    return next((one for one in get_args(annotation) if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _is_path(annotation: Any) -> bool:
    """Whether a field is a path, or has paths in it."""
    return annotation is Path or any(map(_is_path, get_args(annotation)))


def _warn_of_other_inputs(target: Path, inputs: Sequence[InputRecord]) -> None:
    """One line for each picture that the run is given and whose pixels are not those that were recorded."""
    recorded = read_record(target).model_dump() if os.path.isdir(target) else read_metadata(target)
    known = recorded.get("inputs")
    hashes = [entry.get("sha256") for entry in known if isinstance(entry, dict)] if isinstance(known, list) else []
    for given in inputs:
        if hashes and given.sha256 not in hashes:
            log.warning("%s: %s has other pixels than the picture that was recorded", given.key, given.path)


def output_dir(overrides: Sequence[str]) -> Path:
    """The folder of ``hydra.run.dir=FOLDER``, the one override allowed, or a new one under outputs/."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key != "hydra.run.dir" or not value:
            raise ConfigError(f"rerun takes only hydra.run.dir=FOLDER, got {override!r}: it repeats what was recorded")
        return Path(value)
    now = datetime.now()
    return Path("outputs") / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S-%f}"


def _compare(record: RunRecord, hashes: Sequence[str]) -> bool:
    new = [image.sha256 for image in record.images]
    same = sum(a == b for a, b in zip(new, hashes, strict=False))
    log.info("%d of %d image(s) have the same pixels as the original", same, len(hashes))
    return same == len(hashes)
