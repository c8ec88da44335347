"""No field of a record or of a sweep's row is dead: some run sets it to something other than its default."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from checkpoints import spoiled_folder
from helpers import SMALL, draw
from PIL import Image
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fluxrun.cli.app import dispatch
from fluxrun.record.folder import read_record
from fluxrun.record.schema import MemoryRecord, RunRecord
from fluxrun.report.rows import Result, Row

for package in ("skimage", "scipy"):
    pytest.importorskip(package, reason="the extras 'report' and 'eval'")

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"

ONLY_ON_A_GPU = ("gpu", "gpu_memory_bytes", "driver", "cuda")
"""Entries of a record's ``environment``; every field can be set on a CPU."""

CONSTANT = {(RunRecord, "schema_version")}
"""Fields of one possible value."""

BY_SEVERAL_PROCESSES = {(MemoryRecord, "by_rank_bytes")}
"""Fields that pipeline/test_torchrun.py looks at: to start several takes long."""

IN_OTHER_FOLDERS = {(RunRecord, "images_file"), (RunRecord, "resumed_at")}
"""Fields of runs with many images and of those that went on: record/test_journal.py and planning/test_resume.py."""

Field = tuple[type[BaseModel], str]


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation names, in whatever containers."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models(part)


def fields_of(model: type[BaseModel]) -> set[Field]:
    """Every field of a model and of all models in it."""
    found = {(model, name) for name in model.model_fields}
    for field in model.model_fields.values():
        for inner in models(field.annotation):
            found |= fields_of(inner)
    return found


def set_in(value: Any) -> set[Field]:
    """The fields of all models in ``value`` that have something other than their default (a required one: any)."""
    if isinstance(value, (list, dict)):
        return set().union(*map(set_in, value.values() if isinstance(value, dict) else value))
    if not isinstance(value, BaseModel):
        return set()
    fields: set[Field] = set()
    for name, field in type(value).model_fields.items():
        default, own = field.get_default(call_default_factory=True), getattr(value, name)
        if own not in ((None, "", [], {}) if default is PydanticUndefined else (default,)):
            fields.add((type(value), name))
        fields |= set_in(own)
    return fields


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[RunRecord], list[Row]]:
    """What a compiled run, one that falls back, and a sweep with a baseline and a failed job leave in their files."""
    folder = tmp_path_factory.mktemp("fields")
    draw(folder / "compiled", "compile=regional", command=["fluxrun"])
    Image.new("RGB", (64, 64)).save(folder / "given.png")
    given = f"reference_images=[{folder / 'given.png'}]"
    draw(folder / "apply", "compile=regional", "+compile.inductor_options.nonsense=1", given)
    job = ["model=shapes", "prompt=a red circle left of a blue square", "height=64", "width=64", "device=cpu"]
    job += ["attention=xformers", "vae.tile_size=256"]  # one falls back, one is not used
    draw(folder / "slow", *job, "steps=16")  # so slow that two steps break even
    sweep = [*job, "steps=2,0", "seed=0,1", f"sweep.baseline={folder / 'slow'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fluxrun", "--multirun"])
        assert dispatch(["--multirun", *sweep, f"hydra.sweep.dir={folder / 'sweep'}"]) == 1, "steps=0 fails"
    spoiled_folder(folder / "model", "vae")
    local = ["model=local", f"model.path={folder / 'model'}", "model.text_encoder_out_layers=[1,2,3]", *SMALL[1:]]
    assert dispatch(["--multirun", *local, f"hydra.sweep.dir={folder / 'spoiled'}"]) == 1, "black pictures"
    records = [read_record(path.parent) for path in folder.rglob("run.json")]
    results = [Result.model_validate_json((folder / name / "sweep.json").read_text()) for name in ("sweep", "spoiled")]
    return records, [row for result in results for row in result.jobs]


@pytest.mark.parametrize("model", [RunRecord, Row], ids=lambda model: model.__name__)
def test_every_field_is_set_by_some_run(model: type[BaseModel], found: tuple[list[RunRecord], list[Row]]) -> None:
    records, rows = found
    never = fields_of(model) - set_in([*records, *rows]) - CONSTANT - BY_SEVERAL_PROCESSES - IN_OTHER_FOLDERS
    assert not never, sorted(f"{owner.__name__}.{name}" for owner, name in never)


def test_what_only_a_gpu_sets_is_in_a_record_that_is_kept() -> None:
    kept = [RunRecord.model_validate_json(path.read_text()).environment for path in RESULTS.rglob("run.json")]
    assert [name for name in ONLY_ON_A_GPU if not any(environment.get(name) for environment in kept)] == []


def test_a_cpu_sets_everything_else_of_the_environment(found: tuple[list[RunRecord], list[Row]]) -> None:
    environment = next(record.environment for record in found[0] if record.status == "completed")
    unset = {name for name, value in environment.items() if value is None}
    assert unset - {"git_commit"} <= set(ONLY_ON_A_GPU), "git_commit: a checkout's alone"


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("sweep.json")), ids=lambda path: path.parent.name)
def test_a_sweep_of_an_earlier_version_can_be_read(path: Path) -> None:
    result = Result.model_validate_json(path.read_text())
    assert len(result.jobs) == len(json.loads(path.read_text())["jobs"]) > 0
