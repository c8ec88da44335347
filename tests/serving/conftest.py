"""A real server for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import Running, start_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start_server(tmp_path_factory.mktemp("serve"), "--limit", "queue=3", "--limit", "images=4")
    yield running
    running.process.terminate()
    running.process.wait(60)
