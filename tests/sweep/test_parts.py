"""The parts of a sweep by themselves: order, folders that are used again, figures, the leak test over option pairs."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from helpers import CONF, draw, every_option, hashes, small

from fluxrun.config.catalog import is_neutral_option
from fluxrun.config.composition import config_dirs, hydra_for, shown
from fluxrun.record.folder import read_record, write_failure
from fluxrun.record.schema import Chosen, RunRecord
from fluxrun.report.comparison import baseline_rows, break_even_after, compare, mark_front, settings
from fluxrun.report.rows import Picture, Row, Setting, by_speed, label, to_csv
from fluxrun.sweep.baseline import is_neutral, neutral_data
from fluxrun.sweep.folder import arrange
from fluxrun.sweep.grid import ordered

# --- the grid ---------------------------------------------------------------------------------------------------------


def test_what_needs_other_weights_varies_least_and_seeds_most() -> None:
    given = ["seed=0,1", "attention=sdpa,math", "steps=2", "quantization=none,fp8", "model=tiny", "height=64,128"]
    params = {"compile": "none,regional", "seed": "5,6"}
    assert [o.partition("=")[0] for o in ordered(given, params)] == [
        "model", "quantization", "compile", "attention", "height", "steps", "seed",
    ]  # fmt: skip
    assert "seed=0,1" in ordered(given, params), "the command line wins over the sweep's file"


def test_hydras_and_the_sweeps_own_overrides_do_not_describe_a_job() -> None:
    assert shown(["+sweep=x", "sweep.resume=a", "hydra.sweep.dir=b", "hydra/sweeper=optuna", "seed=1"]) == ["seed=1"]


@pytest.mark.parametrize("path", sorted((CONF / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_file_composes_and_says_how_it_is_run(path: Path) -> None:
    from hydra.types import RunMode

    from fluxrun.config.composition import compose_node
    from fluxrun.sweep.planning import plan_sweep

    lines = path.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# fluxrun +sweep={path.stem}")
    dirs = config_dirs()
    overrides = [f"+sweep={path.stem}"]
    with hydra_for(dirs) as hydra:
        sweep = plan_sweep(hydra, compose_node(hydra, overrides, dirs, RunMode.MULTIRUN), overrides, dirs, ["fluxrun"])
    assert sweep.grid is not None
    assert len(sweep.grid) > 1
    assert any(is_neutral(job.data) for job in sweep.grid), "a sweep should have its own baseline"


# --- folders that are used again --------------------------------------------------------------------------------------


def fake_run(folder: Path, name: str, config_hash: str, status: str = "completed") -> None:
    write_failure(folder / name, {}, RuntimeError("x"))
    record = read_record(folder / name).model_dump() | {"config_hash": config_hash, "status": status, "error": None}
    (folder / name / "run.json").write_text(RunRecord.model_validate(record).model_dump_json())


def test_completed_runs_move_to_their_jobs_new_numbers_and_unfinished_ones_aside(tmp_path: Path) -> None:
    for name, config_hash, status in (("0", "a", "completed"), ("1", "b", "failed"), ("2", "c", "completed")):
        fake_run(tmp_path, name, config_hash, status)
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "fluxrun.log").write_text("killed before it had a record")
    completed = arrange(tmp_path, ["c", "b", "d", "a"])
    assert completed == {"a": tmp_path / "3", "c": tmp_path / "0"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "3", "earlier"]
    assert sorted(path.name for path in (tmp_path / "earlier").iterdir()) == ["1-1", "3-1"]
    assert read_record(tmp_path / "0").config_hash == "c"


def test_completed_runs_that_the_new_sweep_does_not_have_are_kept(tmp_path: Path) -> None:
    fake_run(tmp_path, "0", "a")
    assert arrange(tmp_path, ["b"]) == {"a": tmp_path / "kept-a"}
    assert arrange(tmp_path, ["b", "a"]) == {"a": tmp_path / "1"}


def test_a_new_folder_has_nothing_to_arrange(tmp_path: Path) -> None:
    assert arrange(tmp_path / "new", ["a"]) == {}


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "later", "images"),
    [(11.0, 0.5, 21), (1.0, 1.0, 1), (5.0, 1.0, None), (5.0, 2.0, None), (1.0, 0.5, 1), (None, 0.5, None)],
)
def test_after_how_many_images_a_slow_first_one_pays(first: float | None, later: float, images: int | None) -> None:
    found = break_even_after(first, later, 1.0, 1.0)
    assert found == images
    if first is not None and found is not None:
        assert first + (found - 1) * later <= 1.0 + (found - 1) * 1.0


def setting(image_s: float | None, psnr_db: float | None) -> Setting:
    return Setting(label="", jobs=[], status="completed", effective={}, image_s=image_s, psnr_db=psnr_db)


def test_the_pareto_front_has_what_nothing_else_beats_in_both() -> None:
    found = [
        setting(1.0, math.inf),
        setting(0.5, 40),
        setting(0.6, 35),
        setting(0.4, 20),
        setting(0.4, 10),
        setting(None, 50),
    ]
    mark_front(found)
    assert [s.on_front for s in found] == [True, True, False, True, False, False]
    other_size = setting(0.1, math.inf).model_copy(update={"context": "512x512"})
    mark_front([*found, other_size])
    assert [s.on_front for s in found] == [True, True, False, True, False, False], "not beaten by another size's"
    assert other_size.on_front


def row(job: str, image_s: float | None, attention: str = "sdpa", seed: int = 0, **more: object) -> Row:
    config = {"attention": {"name": attention}, "seed": seed, "steps": 4}
    return Row(
        job=job, folder=job, status="completed", overrides=[f"attention={attention}", f"seed={seed}"], steps=4,
        config=config, options={"attention": Chosen(requested=attention, effective=attention)}, image_s=image_s,
        first_image_s=image_s, **more,
    )  # fmt: skip


def test_speed_is_compared_with_the_neutral_job_or_the_one_that_is_named() -> None:
    rows = [row("0", 2.0), row("1", 1.0, "math"), row("2", 1.0, "flex")]
    compare(rows, Path("."))
    assert [r.speedup for r in rows] == [1.0, 2.0, 2.0]
    assert [r.is_baseline for r in rows] == [True, False, False]
    assert [r.job for r in baseline_rows(rows, "attention=flex")] == ["2"]
    compare(rows, Path("."), "attention=flex")
    assert [r.speedup for r in rows] == [0.5, 1.0, 1.0]


def test_jobs_that_differ_in_the_seed_alone_are_one_setting() -> None:
    rows = [row("0", 2.0), row("1", 2.2, seed=1), row("2", 1.0, "math")]
    assert [(s.label, s.jobs) for s in settings(rows)] == [("attention=math", ["2"]), ("attention=sdpa", ["0", "1"])]
    assert label(rows[1], rows) == "attention=sdpa seed=1"


def test_the_csv_has_a_line_per_job_and_the_fastest_first() -> None:
    rows = by_speed([row("0", 2.0), Row(job="1", folder="1", status="failed", reason="no, not; this"), row("2", 1.0)])
    lines = to_csv(rows).splitlines()
    assert [line.partition(",")[0] for line in lines] == ["job", "2", "0", "1"]
    assert '"no, not; this"' in lines[3]


def test_infinite_decibels_survive_the_json() -> None:
    picture = Picture(path="a", prompt="b", seed=0, sha256="c", psnr_db=math.inf)
    assert Picture.model_validate_json(picture.model_dump_json()) == picture


def test_the_neutral_form_of_a_config_keeps_what_places_weights_by_itself() -> None:
    config = small("attention=math", "compile=regional", "memory=auto")
    data = neutral_data(config.source, config.config_dirs)
    assert data["attention"]["name"] == "sdpa"
    assert data["compile"]["name"] == "none"
    assert data["memory"]["name"] == "auto"
    assert is_neutral(data)
    assert not is_neutral(config.source)


# --- nothing leaks from one job into the next -------------------------------------------------------------------------

KNOBS = {"vae": ["vae.tile_size=64", "height=128", "width=128"], "cache": ["cache.force=true"]}
"""What makes an option do something on a picture this small."""


ALL_PAIRS = bool(os.environ.get("FLUXRUN_TEST_ALL_PAIRS"))
"""Set it for every usable option instead of one for each group: minutes instead of half a minute."""


def usable_here() -> list[tuple[str, ...]]:
    """The neutral run, and of each group an option that really runs on this machine; of compile the cheapest."""
    from fluxrun.planning.prepare import prepare

    found: dict[str, list[tuple[str, ...]]] = {}
    for group, name in every_option():
        if (
            group == "model"
            or name == "auto"
            or is_neutral_option(group, name)
            or (group == "compile" and name != "regional")
        ):
            continue
        overrides = (f"{group}={name}", *KNOBS.get(group, ()))
        if not prepare(small(*overrides)).plan.choices[group].fallbacks:
            found.setdefault(group, []).append(overrides)
    return [(), *(option for options in found.values() for option in (options if ALL_PAIRS else options[-1:]))]


@pytest.mark.slow
def test_no_option_changes_what_the_next_job_draws_in_either_order(tmp_path: Path) -> None:
    import networkx

    from fluxrun.pipeline.session_pool import SessionPool
    from fluxrun.process.switches import snapshot

    options = usable_here()
    assert len(options) > 3
    alone = [hashes(draw(tmp_path / f"alone-{n}", *overrides)) for n, overrides in enumerate(options)]
    before = snapshot()
    # A walk through the complete graph: every option directly after every other one.
    walk = networkx.eulerian_circuit(networkx.complete_graph(len(options), create_using=networkx.DiGraph))
    with SessionPool() as pool:
        for number, (_, chosen) in enumerate(walk):
            record = draw(tmp_path / f"job-{number}", *options[chosen], pool=pool)
            assert hashes(record) == alone[chosen], f"job {number}: {options[chosen]}"
        assert pool.loads[0] == "first load"
    assert snapshot() == before


def test_a_pool_keeps_the_pipeline_for_seeds_and_rebuilds_for_options(tmp_path: Path) -> None:
    from fluxrun.pipeline.session_pool import SessionPool

    with SessionPool() as pool:
        first, second, third, other = (
            draw(tmp_path / str(n), *overrides, pool=pool)
            for n, overrides in enumerate((["seed=0"], ["seed=1"], ["seed=0", "steps=3"], ["attention=math"]))
        )
        assert pool.loads == ["first load"]
    assert first.timings.load_s > 0
    assert second.timings.load_s == second.timings.apply_s == third.timings.apply_s == 0
    assert other.timings.apply_s > 0
    assert other.timings.load_s == 0
    assert [len(record.timings.step_s[0]) for record in (first, second, third)] == [2, 2, 3]
    assert hashes(second) == hashes(draw(tmp_path / "alone", "seed=1"))


def test_a_job_that_fails_half_way_leaves_nothing_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fluxrun.drawing import generation as generate
    from fluxrun.pipeline.session_pool import SessionPool

    alone = hashes(draw(tmp_path / "alone"))
    with SessionPool() as pool:
        with monkeypatch.context() as patch:
            patch.setattr(generate.RunFolder, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                draw(tmp_path / "failed", "attention=math", pool=pool)
        assert read_record(tmp_path / "failed").status == "failed"
        assert hashes(draw(tmp_path / "next", pool=pool)) == alone
        assert pool.loads == ["first load"]
