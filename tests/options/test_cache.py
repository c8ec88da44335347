"""Step caches: what they skip is counted, the same every time, and nothing of it outlives the shell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from helpers import CPU, H100, SMALL, draw, effective, fluxrun, hashes, plan_on, small

from fluxrun.hardware.machine import Machine
from fluxrun.options.cache import by_magnitude, spread_out
from fluxrun.pipeline.session_pool import SessionPool

PIPELINES = ("klein", "dev")
STEPS = "steps=8"


# --- planning: no torch needed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "share", "warmup", "expected"),
    [
        (8, 0.5, 4, "11001001"),
        (8, 0.5, 1, "10100101"),
        (10, 0.5, 2, "1100101001"),
        (4, 1.0, 4, "1111"),
        (5, 0.01, 4, "10000"),
        (50, 0.5, 1, None),
    ],
)
def test_a_share_of_the_steps_is_spread_out(steps, share, warmup, expected):
    found = spread_out(steps, share, warmup)
    assert expected in (None, "".join(map(str, found)))
    assert (len(found), sum(found), found[0]) == (steps, max(1, round(share * steps)), 1)


@pytest.fixture
def cached_cpu() -> Machine:
    return Machine(packages={**CPU.packages, "cache-dit": "1.5.3"}, cxx_compiler=CPU.cxx_compiler)


def on_gpu(*overrides: str) -> Any:
    return plan_on(Machine(**{**vars(H100), "packages": {**H100.packages, "cache-dit": "1.5.3"}}), STEPS, *overrides)


@pytest.mark.parametrize("name", ["dbcache", "fixed"])
def test_too_few_steps_or_no_library_is_a_fallback(name, cached_cpu):
    refused = plan_on(cached_cpu, f"cache={name}", "steps=4").choices["cache"]
    assert (refused.effective, refused.fallbacks[0].option) == ("none", name)
    assert "4 steps are too few" in refused.fallbacks[0].reason
    assert effective(plan_on(cached_cpu, f"cache={name}", "steps=4", "cache.force=true"))["cache"] == name
    assert effective(plan_on(cached_cpu, f"cache={name}", "steps=5"))["cache"] == name
    missing = plan_on(CPU, f"cache={name}", STEPS).choices["cache"]
    assert "pip install 'cache-dit>=1.5.3'" in missing.fallbacks[0].reason


def test_a_mask_of_another_length_is_a_fallback(cached_cpu):
    choice = plan_on(cached_cpu, "cache=fixed", STEPS, "cache.mask='110'").choices["cache"]
    assert (choice.effective, choice.fallbacks[0].reason) == ("none", "cache.mask has 3 digits, the run has 8 steps")


@pytest.mark.parametrize(
    ("compile", "expected"),
    [
        ("none", "none"),
        ("regional", "regional"),
        ("default", "regional"),
        ("reduce_overhead", "regional"),
        ("max_autotune", "regional"),
        ("max_autotune_no_cudagraphs", "regional"),
    ],
)
def test_compile_beside_a_step_cache_is_by_block(compile, expected):
    plan = on_gpu("cache=dbcache", f"compile={compile}")
    assert (effective(plan)["compile"], effective(plan)["cache"]) == (expected, "dbcache")
    assert plan.options["compile"].mode is None
    if compile != expected:
        assert "step cache" in plan.choices["compile"].fallbacks[-1].reason


def test_compile_without_fullgraph_stays():
    assert effective(on_gpu("cache=fixed", "compile=default", "compile.fullgraph=false"))["compile"] == "default"


def test_a_stream_of_layers_has_no_room_for_skips():
    assert effective(on_gpu("cache=fixed", "memory=group"))["cache"] == "none"
    assert effective(on_gpu("cache=fixed", "memory=group", "memory.use_stream=false"))["cache"] == "fixed"


def test_knobs_of_the_other_cache_are_noted(cached_cpu):
    plan = plan_on(cached_cpu, "cache=fixed", STEPS, "cache.residual_diff_threshold=0.2", "cache.compute=0.6")
    assert "cache.residual_diff_threshold is set, but cache=fixed does not use it" in plan.notes
    assert not [note for note in plan.notes if "compute" in note]


# --- drawing --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench() -> Iterator[SessionPool]:
    pytest.importorskip("cache_dit")
    with SessionPool() as made:
        yield made


def picture(folder: Any, bench: SessionPool, pipeline: str, *overrides: str) -> tuple[list[str], dict[str, Any]]:
    record = draw(folder, f"model.pipeline={pipeline}", "vae=full", *overrides, pool=bench)
    bench.close()
    assert record.options["cache"].fallbacks == []
    return hashes(record), record.options["cache"].facts


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", ["dbcache", "fixed"])
def test_steps_are_skipped_and_counted_and_the_baseline_stays(tmp_path, bench, pipeline, name):
    plain = picture(tmp_path / "before", bench, pipeline, STEPS)[0]
    # A threshold that everything stays below: random weights change more between steps than a trained model's.
    knobs = (STEPS, f"cache={name}", "cache.residual_diff_threshold=1000", "num_images=2")
    first, facts = picture(tmp_path / "one", bench, pipeline, *knobs)
    again, same = picture(tmp_path / "two", bench, pipeline, *knobs)
    assert first == again
    assert facts == same
    computed = 4
    assert facts["steps_computed_per_image"] == [computed, computed]
    assert facts["steps_skipped_per_image"] == [8 - computed, 8 - computed]
    assert facts["skippable_blocks"] == {"transformer_blocks": 0, "single_transformer_blocks": 1}
    # Of the tiny model's three blocks one can be skipped.
    assert (facts["blocks_run"], facts["blocks_of"]) == (2 * (8 * 2 + computed), 2 * 8 * 3)
    assert first[0] != plain[0]
    assert picture(tmp_path / "after", bench, pipeline, STEPS)[0] == plain


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_cache_that_skips_nothing_draws_the_same_picture(tmp_path, bench, pipeline):
    plain, _ = picture(tmp_path / "plain", bench, pipeline, STEPS)
    cached, facts = picture(tmp_path / "cached", bench, pipeline, STEPS, "cache=dbcache", "cache.max_cached_steps=0")
    assert (facts["steps_computed"], facts["steps_skipped"]) == (8, 0)
    assert facts["blocks_run"] == facts["blocks_of"] == 24
    assert cached == plain


@pytest.mark.parametrize("overrides", [(), ("cache.taylor_order=0",)])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_counts_are_of_blocks_that_really_ran(tmp_path, guidance, overrides):
    """Classifier-free guidance calls the transformer twice a step, and each has a cache of its own."""
    pytest.importorskip("cache_dit")
    from fluxrun.drawing.generation import Generation
    from fluxrun.pipeline.session import Session
    from fluxrun.planning.prepare import prepare
    from fluxrun.record.folder import RunFolder

    knobs = (f"guidance={guidance}", "model.distilled=false", "cache=fixed", "cache.mask='11010101'", *overrides)
    prepared = prepare(small(STEPS, "vae=full", *knobs))
    calls: Counter[str] = Counter()
    with Session(prepared.plan, located=prepared.located) as session:
        session.assemble()
        for name in ("transformer_blocks", "single_transformer_blocks"):
            for block in getattr(session.pipeline.transformer, name):
                block.register_forward_hook(lambda *_, name=name: calls.update([name]))
        assert session.ready_for([])
        Generation(session, RunFolder(tmp_path / "run", prepared.config.source), prepared.jobs).run()
        facts = session.plan.choices["cache"].facts
    branches = 2 if guidance > 1 else 1
    assert calls == {"transformer_blocks": 8 * branches, "single_transformer_blocks": (8 + 5) * branches}
    assert facts["blocks_run"] == sum(calls.values())
    assert (facts["steps_computed"], facts["steps_skipped"]) == (5, 3)


def test_the_pipeline_in_a_notebook_needs_no_arguments_of_ours(tmp_path):
    pytest.importorskip("cache_dit")
    from fluxrun.runner import build

    session = build(small(STEPS, "vae=full", "cache=fixed"))
    try:
        drawing = {"height": 64, "width": 64, "max_sequence_length": 32, "text_encoder_out_layers": (1, 2, 3)}
        session.pipeline(prompt="a red circle", num_inference_steps=6, **drawing)
        session.pipeline(None, "a red circle", sigmas=[1.0, 0.8, 0.5, 0.2], **drawing)
        assert [call["steps_computed"] for call in session.pipeline.cached_calls] == [3, 2]
    finally:
        session.close()


def test_the_schedule_follows_each_runs_steps(tmp_path, bench):
    """A pipeline that is used as it stands draws with other steps: nothing may be left of the last run's."""
    counted = []
    for steps in (8, 12, 8):
        record = draw(tmp_path / f"{len(counted)}", f"steps={steps}", "cache=fixed", "vae=full", pool=bench)
        counted.append(record.options["cache"].facts["steps_computed_per_image"])
    assert counted == [[4], [6], [4]]
    bench.close()


def test_nothing_of_cache_dit_stays_on_diffusers_classes(tmp_path, bench, monkeypatch):
    from diffusers import Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel

    before = [dict(vars(cls)) for cls in (Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel)]
    picture(tmp_path / "cached", bench, "klein", STEPS, "cache=dbcache")
    assert before == [dict(vars(cls)) for cls in (Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel)]
    assert not hasattr(Flux2KleinPipeline, "_is_cached")


def test_the_screen_shows_nothing_of_cache_dit(tmp_path, bench, capfd):
    picture(tmp_path / "cached", bench, "klein", STEPS, "cache=dbcache")
    out, err = capfd.readouterr()
    assert "DBCache" not in out + err


# --- MagCache -----------------------------------------------------------------------------------------------------


def test_magcaches_schedule_follows_from_the_ratios_alone():
    flat = [1.0] * 12
    assert by_magnitude(flat, 12, 2, 0.06, 3) == [1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    falling = [1.0, 1.1, 1.0, 0.99, 0.98, 0.97, 0.9, 0.8]
    assert by_magnitude(falling, 8, 2, 0.06, 3) == [1, 1, 0, 0, 0, 1, 1, 1]
    assert by_magnitude(falling, 8, 2, 0.01, 3) == [1, 1, 0, 1, 1, 1, 1, 1]
    assert by_magnitude(flat, 5, 5, 0.06, 3) == [1] * 5
    assert len(by_magnitude(falling, 20, 4, 0.06, 3)) == 20, "the nearest ratios serve other numbers of steps"


def test_magcache_is_diffusers_own():
    """The same decisions as diffusers' hook makes while it draws."""
    import torch
    from diffusers.hooks.mag_cache import MagCacheConfig, nearest_interp

    random = torch.Generator().manual_seed(0)
    for steps in (7, 12, 28):
        ratios = (1 + 0.1 * torch.randn(12, generator=random)).tolist()
        config = MagCacheConfig(mag_ratios=ratios, num_inference_steps=steps, retention_ratio=3 / steps)
        scales = nearest_interp(torch.tensor(ratios), steps).tolist()
        expected, product, error, count = [], 1.0, 0.0, 0
        for step, scale in enumerate(scales):
            skip = False
            if step >= 3:
                product, count = product * scale, count + 1
                error += abs(1 - product)
                skip = error <= config.threshold and count <= config.max_skip_steps
                if not skip:
                    product, error, count = 1.0, 0.0, 0
            expected.append(int(not skip))
        assert by_magnitude(ratios, steps, 3, config.threshold, config.max_skip_steps) == expected


def test_magcache_without_ratios_says_how_to_get_them(cached_cpu):
    plan = plan_on(cached_cpu, "cache=magcache", "steps=20")
    assert plan.choices["cache"].effective == "none"
    assert "fluxrun calibrate" in plan.choices["cache"].fallbacks[0].reason


@pytest.mark.slow
def test_calibrate_writes_an_option_that_is_used(tmp_path):
    small = [*SMALL, "steps=12", "hydra.run.dir=a"]
    done = fluxrun("calibrate", "--output", "mine/cache/mag_tiny.yaml", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--config-dir mine cache=mag_tiny" in done.stderr
    written = yaml.safe_load((tmp_path / "mine/cache/mag_tiny.yaml").read_text())
    assert len(written["ratios"]) == 12
    assert written["ratios"][0] == 1
    again = fluxrun("calibrate", "--output", "mine/cache/mag_tiny.yaml", *small, cwd=tmp_path)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    record = draw(tmp_path / "run", "cache=mag_tiny", "steps=12", config_dir=tmp_path / "mine")
    facts = record.options["cache"].facts
    expected = sum(by_magnitude(written["ratios"], 12, 4, 0.06, 3))
    assert record.options["cache"].effective == "mag_tiny"
    assert facts["steps_computed"] == expected
    assert facts["steps_skipped"] == 12 - expected
