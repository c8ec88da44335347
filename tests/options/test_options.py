"""Every option of every group on both pipeline classes: it works here or says why not, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import draw, every_option, hashes, option_names

from fluxrun.config.catalog import Catalog
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.process.switches import import_diffusers, snapshot
from fluxrun.record.schema import RunRecord

PIPELINES = ("klein", "dev")
COMPILED = [name for name in option_names("compile") if name not in ("none", "cudagraphs")]
NEUTRAL = {
    group: name
    for group, name in every_option()
    if group != "model" and Catalog().load(group, name).fallback == "error"
}
"""The option of each group that changes nothing, and therefore has no fallback."""

RUNS_ON_CPU = {
    ("attention", "sdpa"), ("attention", "math"), ("attention", "flex"), ("vae", "full"), ("vae", "tiled"),
    ("vae", "sliced"), ("vae", "fast"), ("memory", "resident"), ("memory", "staged"), ("quantization", "none"),
    ("kernels", "diffusers"), ("compile", "none"), ("cache", "none"), ("lora", "none"), ("parallel", "single"),
    *(("scheduler", name) for name in option_names("scheduler")),
    *(("cache", name) for name in ("dbcache", "fixed") if find_spec("cache_dit")),
    *(("quantization", name) for name in ("int8", "int8_weight_only", "fp8_weight_only") if find_spec("torchao")),
    *(("quantization", name) for name in ("sdnq",) if find_spec("sdnq")),
    *(("compile", name) for name in COMPILED),
}  # fmt: skip

NEEDED = {
    "sliced": ("batch_size=2", "num_images=2"), "tiled": ("vae.tile_size=64", "height=128", "width=128"),
    "dbcache": ("steps=8",), "fixed": ("steps=8",),
}  # fmt: skip
"""What an option needs to have anything to do."""

CASES = [
    # What both pipelines share is seen with one of them; `make test` runs both.
    pytest.param(group, name, pipeline, marks=pytest.mark.slow if name in COMPILED or pipeline == "dev" else ())
    for group, name in every_option()
    for pipeline in PIPELINES
    # Each compile setting costs many seconds, and what is compiled is the same transformer class in both pipelines.
    if group != "model" and not (group == "compile" and pipeline == "dev")
]


class Bench:
    """One pipeline class's weights, kept over all its tests, and its picture with everything neutral."""

    def __init__(self, pipeline: str, folder: Path) -> None:
        self.pipeline, self.folder = pipeline, folder
        self.pool = SessionPool()
        self.runs = 0
        self.expected = self.baseline()

    def draw(self, *overrides: str) -> RunRecord:
        self.runs += 1
        # A memory option left to auto would be resident here anyway; said, so that the weights stay the same ones.
        return draw(self.folder / str(self.runs), f"model.pipeline={self.pipeline}", *overrides, pool=self.pool)

    def baseline(self) -> list[str]:
        neutral = [f"{group}={name}" for group, name in NEUTRAL.items()]
        record = self.draw(*neutral)
        assert {g: o.effective for g, o in record.options.items() if g != "model"} == NEUTRAL
        self.pool.close()
        return hashes(record)


@pytest.fixture(scope="module")
def benches(tmp_path_factory) -> Iterator[dict[str, Bench]]:
    import_diffusers()
    made: dict[str, Bench] = {}
    yield made
    for bench in made.values():
        bench.pool.close()


@pytest.fixture
def bench(pipeline, benches, tmp_path_factory) -> Bench:
    if pipeline not in benches:
        benches[pipeline] = Bench(pipeline, tmp_path_factory.mktemp(pipeline))
    return benches[pipeline]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("group", "name", "pipeline"), CASES)
def test_it_works_or_says_why_and_leaves_nothing_behind(group, name, pipeline, bench):
    before = snapshot()
    record = bench.draw(f"{group}={name}", *NEEDED.get(name, ()))
    bench.pool.close()
    assert record.status == "completed"
    entry = record.options[group]
    assert entry.requested == name
    if (group, name) in RUNS_ON_CPU:
        assert (entry.effective, entry.fallbacks) == (name, [])
    elif name == "auto":
        assert entry.fallbacks == []
        assert entry.effective in option_names(group)
    else:
        assert entry.effective == NEUTRAL[group]
        assert [fallback.option for fallback in entry.fallbacks] == [name]
        assert entry.fallbacks[0].reason
    assert snapshot() == before
    assert bench.baseline() == bench.expected
    assert snapshot() == before


def facts(bench: Bench, group: str, *overrides: str) -> dict[str, object]:
    record = bench.draw(*overrides)
    bench.pool.close()
    return record.options[group].facts


# --- what each option counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_attention_counts_processors_and_names_the_kernel(bench):
    sdpa = facts(bench, "attention", "attention=sdpa")
    math = facts(bench, "attention", "attention=math")
    assert sdpa["processors"] == math["processors"] == 3
    assert sdpa["kernel"] != math["kernel"]
    assert "flash" in str(sdpa["kernel"])


@pytest.mark.parametrize("pipeline", ["klein"])
def test_attention_auto_records_its_probe(bench):
    found = facts(bench, "attention", "attention=auto")
    assert found["probe_ms"]["sdpa"] > 0
    assert set(found["left_out"]) == {"cudnn", "flash3", "flash4", "flash", "xformers"}
    # 4×4 image tokens and 32 of text, 2 heads of 32.
    assert found["probe_shape"] == [1, 48, 2, 32]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_tiles_are_decoded_when_asked(bench):
    found = facts(bench, "vae", "vae=tiled", "vae.tile_size=64", "height=128", "width=128")
    assert found["tiles_decoded"] > 1
    one = facts(bench, "vae", "vae=full", "vae.tile_size=64", "height=128", "width=128")
    assert "tiles_decoded" not in one


@pytest.mark.parametrize("pipeline", ["klein"])
def test_slices_are_decoded_when_asked(bench):
    assert facts(bench, "vae", "vae=sliced", "batch_size=2", "num_images=2")["slices_decoded"] == 2


@pytest.mark.parametrize("pipeline", ["klein"])
@pytest.mark.parametrize("overrides", [["vae=tiled"], ["vae=sliced"]])
def test_nothing_to_tile_or_slice_is_a_fallback(bench, overrides):
    record = bench.draw(*overrides)
    bench.pool.close()
    assert record.options["vae"].effective == "full"
    assert "nothing to" in record.options["vae"].fallbacks[0].reason


@pytest.mark.parametrize("pipeline", ["klein"])
def test_channels_last_is_applied_only_with_a_compiled_decoder(bench):
    assert "not applied" in facts(bench, "vae", "vae=full", "vae.channels_last=true")["channels_last"]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_staged_memory_draws_the_same_picture(bench, pipeline, tmp_path):
    record = draw(tmp_path / "run", f"model.pipeline={pipeline}", "memory=staged", "vae=full")
    assert hashes(record) == bench.expected
    found = record.options["memory"].facts
    assert found["prompts_encoded_first"] == 1
    assert found["freed_bytes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["klein"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_really_compiled(bench, name):
    record = bench.draw(f"compile={name}", "strict=true")
    bench.pool.close()
    found = record.options["compile"].facts
    assert found["regions"]["transformer"] == (3 if name == "regional" else 1)
    assert found["graph_breaks"] == 0
    assert found["graphs_run_per_step"] == (3 if name == "regional" else 1)
    assert found["cudagraphs"] == 0
