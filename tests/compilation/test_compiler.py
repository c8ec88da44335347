"""Where compiled kernels are kept, how long compiled code serves, and that torch giving up on it is noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers import CPU, draw, small
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from fluxrun.compilation.compiler import Compiler, LimitWatch
from fluxrun.paths import cache_dir
from fluxrun.pipeline.session_pool import SessionPool, graphs_key
from fluxrun.planning.prepare import prepare


@pytest.mark.parametrize(
    ("environment", "option", "expected"),
    [
        (None, None, cache_dir() / "inductor"),
        (default_cache_dir(), None, cache_dir() / "inductor"),  # what torch itself wrote there
        ("/the/users", None, Path("/the/users")),
        ("/the/users", Path("/the/options"), Path("/the/options")),
    ],
)
def test_the_folder_of_compiled_kernels(monkeypatch, environment, option, expected):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", environment or "")
    if environment is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    Compiler().use_cache(option)
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == expected


def test_dynamo_giving_up_is_counted():
    """After so many recompilations it runs a function eagerly and only logs that."""
    LimitWatch.install()
    LimitWatch.install()
    before = LimitWatch.hits
    with torch._dynamo.config.patch(recompile_limit=1):
        double = torch.compile(lambda x: x * 2, backend=lambda graph, inputs: graph.forward, dynamic=False)
        for size in (2, 3, 4):
            assert double(torch.ones(size)).sum() == 2 * size
    torch.compiler.reset()
    assert LimitWatch.hits == before + 1


@pytest.mark.slow
def test_sizes_in_one_process(tmp_path):
    """compile.dynamic=true: one set of graphs for all sizes; else each size has its own, whatever came before it."""
    sizes = [("height=64", "width=64"), ("height=96", "width=96"), ("height=64", "width=160")]

    def facts(dynamic: str) -> list[dict]:
        folder = tmp_path / dynamic
        with SessionPool() as bench:
            options = ("compile=regional", f"compile.dynamic={dynamic}", "strict=true", "vae=full")
            records = [draw(folder / str(n), *options, *size, pool=bench) for n, size in enumerate(sizes)]
        return [record.options["compile"].facts for record in records]

    shared, own = facts("true"), facts("false")
    assert all(found["graphs_run_per_step"] == 3 for found in (*shared, *own))
    assert [found["graphs_compiled"] for found in shared[1:]] == [0, 0]
    assert [found["graphs_compiled"] for found in own] == [2, 2, 2]
    assert {found["recompile_limit_hits"] for found in (*shared, *own)} == {0}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("height=64", "height=128", True),
        ("height=64", "batch_size=2", True),
        ("height=64", "attention=math", False),
        ("height=64", "compile.scope=full", False),
        ("compile.dynamic=false", "compile.dynamic=false", False),
    ],
)
def test_when_graphs_serve_another_job(one, other, same):
    keys = [
        graphs_key(prepare(small("compile=regional", "compile.dynamic=true", override), CPU))
        for override in (one, other)
    ]
    assert (keys[0] is not None and keys[0] == keys[1]) == same
