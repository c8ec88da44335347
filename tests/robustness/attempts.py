"""One case of each kind: what is written, and what of fluxrun then reads it. Nothing here catches an error."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import tiny_folder
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from robustness import strategies as made
from robustness.strategies import config_texts, damaged, json_texts

from fluxrun.atomic import write_atomically
from fluxrun.cli import app, draw, rerun
from fluxrun.config.composition import compose
from fluxrun.config.prompts import Job, read_prompts
from fluxrun.errors import FluxrunError
from fluxrun.planning.prepare import prepare
from fluxrun.record import journal
from fluxrun.record.folder import RunFolder, read_record
from fluxrun.record.picture import EXIF_IMAGE_DESCRIPTION, METADATA_KEY
from fluxrun.record.writing import short_text
from fluxrun.report.page import write_report
from fluxrun.report.result import rebuild
from fluxrun.report.rows import to_csv
from fluxrun.runner import run
from fluxrun.sweep.run import Sweep

CONF = Path(__file__).resolve().parents[2] / "conf"

SMALL = ("height=64", "width=64", "steps=1", "model.max_sequence_length=32", "prompt=a cat")


@dataclass(frozen=True)
class Kind:
    """One kind of case: how it is made, what is done with it, and how long that may take at most."""

    name: str
    cases: st.SearchStrategy[Any]
    attempt: Callable[[Any, Path], None]
    deadline_s: float


# --- the command line -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nothing_drawn() -> Iterator[None]:
    """Runs and sweeps end where they would begin to load: everything before that is real."""
    kept = draw.run, Sweep.run, dict(os.environ), list(sys.argv), logging.root.handlers[:], os.getcwd()
    draw.run = lambda *_, **__: None  # type: ignore[assignment]
    Sweep.run = lambda *_, **__: 0  # type: ignore[method-assign]
    try:
        yield
    finally:
        draw.run, Sweep.run = kept[:2]  # type: ignore[method-assign]
        os.environ.clear()
        os.environ.update(kept[2])
        sys.argv, logging.root.handlers[:] = kept[3], kept[4]
        os.chdir(kept[5])


def _command_line(arguments: list[str], folder: Path) -> None:
    os.chdir(folder)
    with nothing_drawn(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            app.dispatch(arguments)
        except SystemExit as ended:  # --help and the like
            if ended.code not in (None, 0):
                raise AssertionError(f"the process ended with {ended.code}") from ended


def _typed(arguments: list[str]) -> list[str]:
    """Arguments as a shell can hand them over: no NUL, and bytes that are not UTF-8 as Python decodes them."""
    return [
        os.fsdecode(
            a.replace("\0", "").encode(
                "utf-8",
                "surrogateescape",
            )
        )
        for a in arguments
        if _encodes(a)
    ]


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


# --- files ------------------------------------------------------------------------------------------------------------


def _originals(*groups: str) -> list[str]:
    return [path.read_text(encoding="utf-8") for group in groups for path in sorted((CONF / group).glob("*.yaml"))]


def _config_file(case: tuple[str, str], folder: Path) -> None:
    group, text = case
    (folder / "conf" / group).mkdir(parents=True)
    (folder / "conf" / group / "mine.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    plus = "" if group in ("attention", "compile", "memory") else "+"
    verb = ["--multirun"] if group == "sweep" else ["plan"]
    _command_line([*verb, "--config-dir", str(folder / "conf"), f"{plus}{group}=mine"], folder)


_config_files = st.one_of(
    st.tuples(st.just("preset"), config_texts(_originals("preset"))),
    st.tuples(st.just("sweep"), config_texts(_originals("sweep"))),
    st.tuples(st.sampled_from(["attention", "compile", "memory"]), config_texts(_originals("attention", "compile"))),
)


def _prompts_file(case: tuple[str, str | bytes], folder: Path) -> None:
    suffix, content = case
    path = folder / f"prompts{suffix}"
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    read_prompts(path)


# --- what runs leave behind -------------------------------------------------------------------------------------------


@functools.cache
def finished_run() -> Path:
    """A run's folder with one picture, as a finished run leaves it, of a picture that nobody drew."""
    import tempfile

    config = compose(["model=tiny", *SMALL])
    folder = RunFolder(Path(tempfile.mkdtemp(prefix="fluxrun-record-")) / "0", config.source, ["fluxrun"])
    folder.record.options, folder.record.notes = prepare(config).plan.record(), ["a note"]
    folder.record.environment = {"device": "cpu", "python": "3.11", "ram_bytes": 2**33}
    timings = folder.record.timings
    timings.step_s, timings.denoise_s, timings.decode_s, timings.text_encode_s = [[0.1, 0.1]], [0.2], [0.1], [0.1]
    folder.save(Job("a cat", 0), Image.new("RGB", (64, 64), "red"), "png", finite=True, constant=False)
    folder.finish("completed")
    return folder.path


def _metadata() -> Any:
    with Image.open(next(finished_run().glob("images/*.png"))) as picture:
        return json.loads(picture.info[METADATA_KEY])


def _picture(case: tuple[str, Any], folder: Path) -> None:
    how, content = case
    path = folder / f"picture.{'png' if how == 'bytes' else how}"
    if how == "bytes":
        path.write_bytes(content)
    elif how == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt(METADATA_KEY, content)
        Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    else:
        picture = Image.new("RGB", (8, 8))
        exif = picture.getexif()
        exif[EXIF_IMAGE_DESCRIPTION] = '{"fluxrun": ' + content + "}"
        picture.save(path, exif=exif)
    config, _ = rerun.from_image(path)
    prepare(config)


def _written(text: str) -> bool:
    return _encodes(text) and len(text) < 60_000


def _pictures() -> st.SearchStrategy[Any]:
    texts = json_texts(_metadata()).filter(_written)
    files = [path.read_bytes() for path in finished_run().glob("images/*.png")]
    return st.one_of(
        st.tuples(st.just("png"), texts),
        st.tuples(st.just("png"), texts),
        st.tuples(st.sampled_from(["jpg", "webp"]), texts.map(lambda text: text.encode("ascii", "replace").decode())),
        st.tuples(st.just("bytes"), st.sampled_from(files).flatmap(damaged)),
    )


def _record(case: tuple[str, str | bytes], folder: Path) -> None:
    name, content = case
    shutil.copytree(finished_run(), folder / "0")
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    if name == "0/images.jsonl":  # as a killed run leaves it
        write_atomically(folder / "0" / "run.json", short_text(read_record(folder / "0")))
    (folder / name).write_bytes(data)
    result = rebuild([folder], folder)
    to_csv(result.jobs)
    write_report(result, folder, folder / "report.html")
    read_record(folder / "0")
    config, _ = rerun.from_folder(folder / "0")
    prepare(config)


def _records() -> st.SearchStrategy[Any]:
    original = (finished_run() / "run.json").read_bytes()
    sweep = json.loads(rebuild([finished_run().parent], finished_run().parent).model_dump_json())
    overrides = made.config_texts(["- steps=1\n- seed=2\n"])
    line = journal.lines_of(read_record(finished_run()))[0].model_dump_json() + "\n"
    return st.one_of(
        st.tuples(st.just("0/images.jsonl"), json_texts(json.loads(line)).map(lambda text: text + "\n")),
        st.tuples(st.just("0/images.jsonl"), damaged(line.encode())),
        st.tuples(st.just("0/run.json"), json_texts(json.loads(original))),
        st.tuples(st.just("0/run.json"), json_texts(json.loads(original))),
        st.tuples(st.just("0/run.json"), damaged(original)),
        st.tuples(st.just("sweep.json"), json_texts(sweep)),
        st.tuples(st.just("0/overrides.yaml"), overrides),
    )


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _linked(folder: Path) -> Path:
    """The tiny checkpoint again, its files shared with the original."""
    original = tiny_folder("klein")
    shutil.copytree(original, folder / "checkpoint", copy_function=os.link)
    return folder / "checkpoint"


def _checkpoint(case: tuple[str, bytes], folder: Path) -> None:
    name, content = case
    checkpoint = _linked(folder)
    (checkpoint / name).unlink()
    (checkpoint / name).write_bytes(content)
    config = compose(["model=local", f"model.path={checkpoint}", "model.text_encoder_out_layers=[1,2,3]", *SMALL])
    prepare(config)
    try:
        run(config, folder / "run")
    except FluxrunError:
        raise
    except Exception:  # while it draws a library may say what it likes, as long as the record says it in one line
        record = read_record(folder / "run")
        assert record.error is not None
        if record.status != "failed" or record.error.stage in ("prepare", "load") or "\n" in record.error.message:
            raise


def _checkpoints() -> st.SearchStrategy[Any]:
    original = tiny_folder("klein")
    files = [path for path in original.rglob("*") if path.is_file()]
    texts = [path for path in files if path.suffix == ".json"]

    def changed(path: Path) -> st.SearchStrategy[bytes]:
        data = path.read_bytes()
        if path.suffix != ".json" or len(data) > 200_000:
            return damaged(data)
        text = json_texts(json.loads(data)).map(lambda text: text.encode("utf-8", "surrogatepass"))
        return st.one_of(text, text, text, damaged(data))

    def case(path: Path) -> st.SearchStrategy[tuple[str, bytes]]:
        return changed(path).map(lambda data: (str(path.relative_to(original)), data))

    return st.one_of(st.sampled_from(texts), st.sampled_from(files)).flatmap(case)


# --- all of them ------------------------------------------------------------------------------------------------------


def kinds() -> dict[str, Kind]:
    """Every kind of case, by name."""
    all_of_them = [
        Kind("overrides", made.command_lines.map(_typed), _command_line, 15),
        Kind("config files", _config_files, _config_file, 15),
        Kind("prompt files", made.prompt_files, _prompts_file, 5),
        Kind("picture metadata", st.deferred(_pictures), _picture, 15),
        Kind("records", st.deferred(_records), _record, 30),
        Kind("checkpoints", st.deferred(_checkpoints), _checkpoint, 20),
    ]
    return {kind.name: kind for kind in all_of_them}
