"""The processes that draw one picture together, by torch.distributed: what they tell each other and agree on."""

from __future__ import annotations

import signal
from datetime import timedelta
from typing import TYPE_CHECKING, ClassVar, TypeVar

from fluxrun.errors import FluxrunError, one_line
from fluxrun.process.signals import Interrupts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

ALONE_S = 60.0
"""How long a process whose first call failed waits for the others to come to the end of theirs."""


class RankFailed(FluxrunError):
    """One of the processes failed in a way that the others cannot follow."""


class Ranks:
    """This process where it draws alone: there is nobody to agree with."""

    rank = 0
    size = 1
    backend: str | None = None

    def check(self, interrupts: Interrupts) -> None:
        """Raise Interrupted if a signal has come, to whichever process."""
        interrupts.check()

    def first(self, value: T) -> T:
        """The first process's value, in every one."""
        return value

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        return [value]

    def agreed(self, failure: T | None) -> T | None:
        """The first failure among all processes, or None; called by each of them at the same point.

        Raises RankFailed where the others do not come to that point: they wait for this one in the middle of it.
        """
        return failure

    def mesh(self, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
        """The processes laid out in dimensions of these names."""
        raise RuntimeError("this process was not started by torchrun, it draws alone")


ALONE = Ranks()


class Group(Ranks):
    """This process among those that torchrun has started.

    On the GPU the parallelism itself communicates (NCCL); what is agreed on goes over the CPU (gloo), so that no stream
    waits for it.
    """

    _joined: ClassVar[Group | None] = None

    def __init__(self, device: str, timeout_minutes: float) -> None:
        import torch
        import torch.distributed as dist
        import torch.distributed._functional_collectives

        self._device = "cuda" if device.startswith("cuda") else "cpu"
        self._timeout = timedelta(minutes=timeout_minutes)
        if self._device == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self._device == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=self._timeout)
        self._gloo: ProcessGroup = dist.new_group(backend="gloo", timeout=self._timeout)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.backend = "nccl" if self._device == "cuda" else "gloo"
        self._meshes: dict[tuple[tuple[int, ...], tuple[str, ...]], DeviceMesh] = {}

    @classmethod
    def join(cls, device: str, timeout_minutes: float) -> Group:
        """The processes' one group; its first run's timeout counts. Imports torch."""
        if Group._joined is None:
            Group._joined = cls(device, timeout_minutes)
        return Group._joined

    def check(self, interrupts: Interrupts) -> None:
        import torch
        import torch.distributed as dist

        asked = torch.tensor(int(interrupts.requested or 0))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._gloo)
        if number := int(asked):
            interrupts.requested = interrupts.requested or signal.Signals(number)
        interrupts.check()

    def first(self, value: T) -> T:
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._gloo)
        return values[0]

    def gather(self, value: T) -> list[T]:
        import torch.distributed as dist

        values = [value] * self.size
        dist.all_gather_object(values, value, group=self._gloo)
        return values

    def agreed(self, failure: T | None) -> T | None:
        import torch.distributed as dist

        patience = self._timeout if failure is None else timedelta(seconds=ALONE_S)
        try:
            dist.monitored_barrier(self._gloo, timeout=patience)
        except RuntimeError as error:
            raise RankFailed(f"rank {self.rank} failed alone, the others did not follow ({one_line(error)})") from error
        return next((found for found in self.gather(failure) if found is not None), None)

    def mesh(self, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
        """Made once: each one's communicators take memory on the GPU."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.distributed_c10d import _set_pg_timeout

        layout = (shape, names)  # a ring of two and two that share heads have the same names
        if layout not in self._meshes:
            mesh = self._meshes[layout] = init_device_mesh(self._device, shape, mesh_dim_names=names)
            whole = [mesh._flatten().get_group()] if len(names) > 1 else []  # which diffusers makes otherwise
            for group in (*map(mesh.get_group, names), *whole):
                _set_pg_timeout(self._timeout, group)  # a mesh's groups have a timeout of their own
        return self._meshes[layout]
