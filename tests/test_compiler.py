"""Where compiled kernels are kept: fluxrun's cache folder, unless the option or the environment says otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from fluxrun.compiler import Compiler
from fluxrun.paths import cache_dir


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
