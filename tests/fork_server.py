"""A process that has imported the libraries and forks: a fluxrun process starts in tenths of a second, not in five.

Only libraries are imported beforehand, fluxrun itself in each child. What a child gets is what a new process would
have: its arguments, environment, folder, streams, session and signals. Linux only: forking needs a process without
threads, which this one is there.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

LIBRARIES = (
    "hydra.main", "pydantic", "rich.progress", "psutil", "PIL.Image", "torch._inductor.compile_fx",
    "diffusers.models.attention_dispatch", "diffusers.models.autoencoders.autoencoder_kl_flux2",
    "diffusers.models.transformers.transformer_flux2", "diffusers.pipelines.flux2",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete", "transformers.models.mistral3.modeling_mistral3",
    "transformers.models.qwen3.modeling_qwen3",
)  # fmt: skip

READ_WHEN_USED = (
    "COLUMNS", "COMP_", "FLUXRUN_", "HYDRA_", "PYTEST_", "PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR", "_TORCHINDUCTOR_",
)  # fmt: skip
"""Beginnings of environment variables that no library reads at its import: these may differ from the server's."""

FOUR_FDS = 4


@functools.cache
def import_libraries() -> None:
    """Import what a run imports, and take it out of the garbage collector: three quarters of a tiny run's time.

    The models of a run are given up by collecting, and that looks through every object torch and diffusers have made.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


class Forked:
    """A child of the server, used like a ``subprocess.Popen``."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid, self._status = pid, status
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, once the process has ended."""
        return self._read(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end."""
        code = self._read(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def _read(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(os.read(self._status, 16) or b"-9")
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to a process that has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The server as the tests see it: started at the first use, ended with this process."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._server: tuple[subprocess.Popen[str], socket.socket] | None = None

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Whether a process with this environment may start from libraries that are imported already."""
        if sys.platform != "linux" or any(_packages(folder) for folder in _added(environment, self.environment)):
            return False
        differing = {n for n in {*environment, *self.environment} if environment.get(n) != self.environment.get(n)}
        return all(name.startswith(READ_WHEN_USED) for name in differing)

    def start(
        self, arguments: list[str], *, cwd: Path, env: Mapping[str, str], stdout: IO[Any], stderr: IO[Any]
    ) -> Forked:
        """A process that runs ``python -m`` with these arguments, in a session of its own."""
        server, connection = self._server = self._server or self._started()
        ours, theirs = os.pipe()
        with open(os.devnull, "rb") as stdin:
            request = json.dumps({"arguments": arguments, "cwd": str(cwd), "environment": dict(env)}).encode()
            fds = [theirs, *(stream.fileno() for stream in (stdin, stdout, stderr))]
            socket.send_fds(connection, [len(request).to_bytes(4, "big")], fds)
            connection.sendall(request)
        os.close(theirs)
        pid = connection.recv(4, socket.MSG_WAITALL)
        if not pid:
            raise RuntimeError(f"the fork server has ended: {server.stderr and server.stderr.read()}")
        return Forked(int.from_bytes(pid, "big"), ours)

    def _started(self) -> tuple[subprocess.Popen[str], socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            server = subprocess.Popen(
                command, env=self.environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
        return server, ours


def _folders(environment: Mapping[str, str]) -> list[str]:
    return [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]


def _added(environment: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    return [folder for folder in _folders(environment) if folder not in _folders(before)]


def _packages(folder: str) -> bool:
    """Whether a folder may stand in for a library; a user's modules lie there as single files."""
    return any(Path(folder).glob("*/__init__.py"))


# --- in the server ----------------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> dict[str, Any]:
    """Fork for each request until the tests are over; returns in the children only, with what each is to run."""
    children: dict[int, tuple[int, int]] = {}
    while True:
        ready, _, _ = select.select([connection, *children], [], [])
        for pidfd in set(ready) - {connection}:
            pid, status = children.pop(pidfd)
            os.write(status, str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
            os.close(status)
            os.close(pidfd)
        if connection in ready:
            size, fds, _, _ = socket.recv_fds(connection, 4, FOUR_FDS)
            if not size:
                os._exit(0)
            request = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
            pid = os.fork()
            if not pid:
                for pidfd, (_, status) in children.items():
                    os.close(pidfd)
                    os.close(status)
                become(request, fds, connection)
                return request
            for fd in fds[1:]:
                os.close(fd)
            children[os.pidfd_open(pid)] = (pid, fds[0])


def become(request: dict[str, Any], fds: list[int], connection: socket.socket) -> None:
    """Make the process that has just been forked what the request asks for, then say its number."""
    os.setsid()
    for number, fd in enumerate(fds[1:]):
        os.dup2(fd, number)
        os.close(fd)
    os.close(fds[0])
    os.chdir(request["cwd"])
    sys.path[:1] = [os.getcwd(), *_added(request["environment"], os.environ)]
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    connection.sendall(os.getpid().to_bytes(4, "big"))
    connection.close()


def main() -> None:
    """Import the libraries, serve, and in each child run what was asked for as if it were the whole process."""
    import_libraries()
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    module, *arguments = request["arguments"]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
