"""What the tests of refusals share: a command is typed, and its one line comes back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import said
from robustness.attempts import nothing_drawn
from robustness.campaign import unclean

from fluxrun.cli.app import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; runs and sweeps end where they would begin to load."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with nothing_drawn(), warnings.catch_warnings():
        yield tmp_path


@pytest.fixture
def refusal(here: Path, capsys: pytest.CaptureFixture[str]):
    """Types a command and returns its one line; checks that there is only that, and the exit code."""

    def typed(*arguments: str, code: int = 2) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        written = capsys.readouterr()
        (line,) = said(written.err)
        assert written.out == ""
        assert line.startswith("error: ")
        assert unclean(line) is None
        assert ended.value.code == code
        return line

    return typed
