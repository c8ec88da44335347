"""How a quantization library is imported, and that nothing of it outlives the import."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

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
