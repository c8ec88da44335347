"""On a GPU with an empty Triton cache: every kernel of a run is compiled while its weights are loaded, none later."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

RUN = """
import json, sys
import fluxrun
from triton import knobs
found, hits = [], []
knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
knobs.runtime.jit_cache_hook = lambda fn, is_manual_warmup, **_: found.append([fn.name, is_manual_warmup]) and None
record = fluxrun.run(fluxrun.compose(sys.argv[2:]), sys.argv[1])
facts = record.options["compile"].facts.get("triton_artifacts")
print(json.dumps([found, [image.sha256 for image in record.images], record.notes, hits, facts]))
"""


MODEL = ("model=flux2_klein_4b", "model.weights=random", "kernels.compile_ahead=true")


def drawn(folder, cache, *overrides):
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", RUN, str(folder), *MODEL, *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [("+preset=h100_fast",), ("kernels=fused", "vae=fast", "height=768", "width=1360")]
)
def test_no_kernel_is_compiled_after_loading(overrides, tmp_path):
    kernels, pictures, notes, *_ = drawn(tmp_path / "cold", tmp_path / "triton", *overrides)
    assert kernels
    assert [name for name, ahead in kernels if not ahead] == []
    assert not [note for note in notes if "kernels" in note]
    assert drawn(tmp_path / "warm", tmp_path / "triton", *overrides)[1] == pictures


@pytest.mark.slow
def test_a_second_machine_compiles_nothing(tmp_path):
    shared = ("+preset=h100_fast", f"compile.cache_artifacts={tmp_path / 'team.artifacts'}")
    _, pictures, _, hits, facts = drawn(tmp_path / "first", tmp_path / "triton", *shared)
    assert not any(hits)
    assert facts["loaded"] == 0
    assert facts["saved"] >= len(hits)  # launchers, too
    _, again, _, hits, after = drawn(tmp_path / "second", tmp_path / "another", *shared)
    assert hits
    assert all(hits)
    assert (after["loaded"], after["saved"]) == (facts["saved"], 0)
    assert again == pictures
