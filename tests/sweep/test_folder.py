"""A sweep's folder is one process's: others are refused, and however that process ends, the next one gets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout

from fluxrun.errors import ConfigError
from fluxrun.sweep.folder import locked

HOLD = "import sys\nfrom pathlib import Path\nfrom fluxrun.sweep.folder import locked\n"
HOLD += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"


def test_another_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=rf"another sweep is running in {tmp_path}: wait"), locked(tmp_path):
            pass
        child.kill()
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"cannot write to the output folder .*file: File exists"),
        locked(tmp_path / "file"),
    ):
        pass


def test_somebody_elses_lock_is_no_other_sweep(tmp_path: Path) -> None:
    with pytest.raises(Timeout), locked(tmp_path):
        raise Timeout("a download's lock")
