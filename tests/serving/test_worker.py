"""What the process that draws tells the server: whole lines, also from the handler of a signal."""

from __future__ import annotations

import json
import os
import signal
import threading

from fluxrun.serving.worker import Events


def test_a_signals_handler_reports_while_a_line_is_being_written():
    reading, writing = os.pipe()
    events = Events(writing)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: events.send("line", text="stopping"))
    seen: list[bytes] = []

    def read() -> None:
        seen.append(os.read(reading, 1000))  # the line has begun, and the pipe is full
        os.kill(os.getpid(), signal.SIGUSR1)
        with os.fdopen(reading, "rb") as pipe:
            seen.append(pipe.read())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        events.send("line", text="x" * 2_000_000)
    finally:
        signal.signal(signal.SIGUSR1, before)
        os.close(writing)
    reader.join()
    first, second = (json.loads(line) for line in b"".join(seen).splitlines())
    assert len(first["text"]) == 2_000_000
    assert second["text"] == "stopping"
