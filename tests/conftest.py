"""What the whole suite shares: quiet libraries, one cache folder, one compile cache, nothing outside a temp folder."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from fork_server import import_libraries

# Before torch is imported anywhere: two threads on a shared two-core machine are slower than one, and a picture must
# not depend on how many there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("FLUXRUN_TRUST_CONFIG", "HYDRA_FULL_ERROR"):
    os.environ.pop(name, None)

# A background job ignores Ctrl+C, and one of nohup a closed terminal: so would every process that is interrupted here.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# pytest-xdist's workers inherit the environment, and with it the folder of the process that started them.
if "FLUXRUN_TEST_SESSION" not in os.environ:
    os.environ["FLUXRUN_TEST_SESSION"] = tempfile.mkdtemp(prefix="fluxrun-tests-")
    atexit.register(shutil.rmtree, os.environ["FLUXRUN_TEST_SESSION"], ignore_errors=True)
ROOT = Path(__file__).resolve().parents[1]
SESSION = Path(os.environ["FLUXRUN_TEST_SESSION"])
os.environ["FLUXRUN_CACHE_DIR"] = str(SESSION / "cache")
os.environ["FLUXRUN_DATA_DIR"] = str(SESSION / "data")
# One compile cache for the suite and its child processes, kept for the next time: a cold compile costs some twenty
# seconds. A test of what happens without one makes an empty one of its own.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(ROOT / ".test_cache" / f"inductor-torch-{version('torch')}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: of two workers none then begins a long one when the other has nothing left to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Where some test module has imported torch, the others' libraries come now, too: see ``import_libraries``."""
    if "torch" in sys.modules:
        import_libraries()


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    """An empty ``--config-dir`` folder."""
    folder = tmp_path / "my_conf"
    folder.mkdir()
    return folder


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment lifts the trust rule."""
    monkeypatch.setenv("FLUXRUN_TRUST_CONFIG", "1")


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offload "to" the CPU: copies are made, as to a GPU, and everything else is real."""
    import torch

    from fluxrun.offload import components as offload
    from fluxrun.options.memory import Offload

    def copied(tensor: torch.Tensor, device: object) -> torch.Tensor:
        copy = tensor.detach().clone()
        return torch.nn.Parameter(copy, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else copy

    monkeypatch.setattr(Offload, "requires", lambda self, machine: None)
    monkeypatch.setattr(offload, "copied", copied)


@pytest.fixture(autouse=True)
def no_handlers_left() -> Iterator[None]:
    """A command sets the log up for its process; the next test's is another one."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
