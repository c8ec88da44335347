"""How a quantization library is imported, and that nothing of it outlives the import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fluxrun.process.switches import ProcessState
from fluxrun.quantization import libraries

SCRIPT = """
import json, os, sys
import torch, torch._dynamo.config as config
from fluxrun.quantization.libraries import LIMITS, import_library
before = [getattr(config, name) for name in LIMITS]
facts = import_library("sdnq", sys.argv[1])
again = import_library("sdnq", "cuda")
after = [getattr(config, name) for name in LIMITS]
print(json.dumps([facts, again, before == after, os.environ.get("SDNQ_USE_TORCH_COMPILE")]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("given", [None, "0"])
def test_sdnq_on_a_cpu(given):
    """Eager dequantizers, decided once for the process; torch's limits and the environment as they were."""
    pytest.importorskip("sdnq")
    environment = {key: value for key, value in os.environ.items() if key != "SDNQ_USE_TORCH_COMPILE"}
    environment |= {"SDNQ_USE_TORCH_COMPILE": given} if given else {}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "cpu"], capture_output=True, text=True, check=True, env=environment
    )
    facts, again, same_limits, left = json.loads(done.stdout.splitlines()[-1])
    assert facts["dequantizers"] == "eager"
    assert facts["sdnq"]
    assert again == facts  # a process keeps what its first run has decided
    assert same_limits
    assert left == given


@pytest.mark.parametrize(("torch_version", "raised"), [([2, 11], True), ([2, 12], False), ([2, 13], False)])
def test_before_torch_2_12_its_compiled_functions_need_the_processs_limits_until_the_run_ends(
    torch_version, raised, monkeypatch
):
    from torch._dynamo import config

    common = SimpleNamespace(use_torch_compile=True, torch_version=torch_version)
    monkeypatch.setitem(sys.modules, "sdnq.common", common)
    before = config.recompile_limit
    with ProcessState():
        libraries.allow_recompiling()
        assert config.recompile_limit == (libraries.MANY if raised else before)
    assert config.recompile_limit == before
    common.use_torch_compile = False
    libraries.allow_recompiling()
    assert config.recompile_limit == before
