"""Ray for the time of one command: a cluster that is there, or one on this machine alone that ends with the command."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxrun.config.schema import WorkersConfig
from fluxrun.errors import ConfigError, FluxrunError, one_line
from fluxrun.formatting import counted
from fluxrun.hardware.detection import detect
from fluxrun.process.signals import EXIT_CODES
from fluxrun.workers.keeper import start_keeper

log = logging.getLogger("fluxrun.workers")

OBJECT_STORE_BYTES = 100 * 2**20
"""What Ray keeps for objects that travel: configs and lines, never a tensor."""

OURS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",  # by itself it lets every other program go first (15)
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what makes Ray's processes listen on the loopback address alone
}
"""The environment of a Ray that is started here."""

TOKEN = "RAY_AUTH_TOKEN"
"""The variable with the token that Ray's processes show each other; without it Ray writes one to the home folder."""


@dataclass(frozen=True)
class Cluster:
    """What a command has of Ray."""

    gpus: int
    workers: int
    """How many actors it starts."""

    @property
    def resources(self) -> dict[str, float]:
        """What each of them takes."""
        return {"num_cpus": 1, "num_gpus": 1 if self.gpus else 0}


def ray_is_there() -> bool:
    """Whether Ray is installed; importing it takes a second."""
    return importlib.util.find_spec("ray") is not None


def check_workers(config: WorkersConfig) -> None:
    """Refuse workers that cannot be, before anything is started. Raises ConfigError."""
    asked = f"workers={config.workers}"
    if not ray_is_there():
        raise ConfigError(f"{asked} needs Ray, which is not installed: pip install 'fluxrun[ray]'")
    if (address := config.ray.address) is not None:
        if address.startswith("ray://"):
            raise ConfigError(f"ray.address={address}: give the cluster's own address (host:6379), not a Ray client's")
        return
    gpus = len(detect().gpus)
    if gpus and config.workers != "auto" and config.workers is not None and config.workers > gpus:
        raise ConfigError(f"{asked}: each worker takes a GPU, and this machine has {counted(gpus)}")


def handlers() -> dict[signal.Signals, Any]:
    """What handles signals in this process, as far as this thread may change it."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: found for number in EXIT_CODES if (found := signal.getsignal(number)) is not None}


@contextlib.contextmanager
def connected(config: WorkersConfig) -> Iterator[Cluster]:
    """Within: Ray is there. Raises ConfigError where the cluster is not."""
    with contextlib.ExitStack() as stack:
        ours = handlers()
        if config.ray.address is None:
            stack.enter_context(_started_here(config))
        else:
            stack.enter_context(_joined(config.ray.address))
        for number, handler in ours.items():
            signal.signal(number, handler)  # Ray has set one of its own for SIGTERM
        import ray

        _quiet()
        gpus = int(ray.cluster_resources().get("GPU", 0))
        workers = (gpus or 1) if config.workers == "auto" else config.workers
        assert workers is not None
        if gpus and workers > gpus:
            log.warning("the cluster has %d GPU(s): further workers begin when it has more", gpus)
        log.info("%d worker(s), %s", workers, "a GPU each" if gpus else "on CPUs")
        try:
            yield Cluster(gpus, workers)
        except ray.exceptions.RayError as error:  # that no worker has anything to do with: its head is gone
            raise FluxrunError(f"Ray has failed: {one_line(error)}") from error


@contextlib.contextmanager
def _started_here(config: WorkersConfig) -> Iterator[None]:
    gpus = len(detect().gpus)
    places = os.path.isdir("/tmp")  # the names of Ray's sockets may have a hundred characters, with the folder's
    folder = Path(tempfile.mkdtemp(prefix="fluxrun-ray-", dir="/tmp" if places else None))
    keeper = start_keeper(folder)
    os.environ |= OURS
    os.environ.setdefault(TOKEN, secrets.token_hex(32))
    import ray  # after the variables: it reads them when it is imported

    try:
        _start(folder, (gpus or 1) if config.workers == "auto" else config.workers or 1, gpus)
        yield
    finally:
        ray.shutdown()
        keeper.close()


def _quiet() -> None:
    """No paragraph on standard output for a lost worker: Ray prints it whatever ``log_to_driver`` is."""
    from ray._private import worker

    worker._worker_logs_enabled = False


def _start(folder: Path, cpus: int, gpus: int) -> None:
    """Start Ray's processes; once more where they were not there within Ray's own half a minute."""
    import ray

    for is_last in (False, True):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                configure_logging=False,
                log_to_driver=False,
                _temp_dir=str(folder / "ray"),  # Ray opens its own to everybody, and its parent is ours alone
            )
            return
        except Exception as error:  # Ray raises plain ones
            ray.shutdown()
            if is_last:
                raise FluxrunError(f"Ray did not start on this machine: {one_line(error)}") from error


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    import ray

    try:
        ray.init(address=address, configure_logging=False, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"ray.address={address}: no Ray cluster answers there ({one_line(error)})") from error
    try:
        yield
    finally:
        ray.shutdown()
