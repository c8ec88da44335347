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
found = []
knobs.runtime.jit_cache_hook = lambda fn, is_manual_warmup, **_: found.append([fn.name, is_manual_warmup]) and None
record = fluxrun.run(fluxrun.compose(sys.argv[2:]), sys.argv[1])
print(json.dumps([found, [image.sha256 for image in record.images], record.notes]))
"""


def drawn(folder, cache, *overrides):
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", RUN, str(folder), "model=flux2_klein_4b", "model.weights=random", *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [("+preset=h100_fast",), ("kernels=fused", "vae=fast", "height=768", "width=1360")]
)
def test_no_kernel_is_compiled_after_loading(overrides, tmp_path):
    kernels, pictures, notes = drawn(tmp_path / "cold", tmp_path / "triton", *overrides)
    assert kernels
    assert [name for name, ahead in kernels if not ahead] == []
    assert not [note for note in notes if "kernels" in note]
    assert drawn(tmp_path / "warm", tmp_path / "triton", *overrides)[1] == pictures
