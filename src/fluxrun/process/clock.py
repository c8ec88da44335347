"""Points in time of what a device does, by the process's own clock: on a GPU nothing waits for one to be noted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeAlias

from fluxrun.process.device import synchronize

if TYPE_CHECKING:
    import torch

Mark: TypeAlias = "float | torch.cuda.Event"
"""A point in time: an event in a GPU's queue, or the clock's seconds."""


class DeviceClock:
    """Tells when a device came by a point in its work, in seconds as ``time.perf_counter`` gives them.

    A GPU is only handed its work: what the clock says at that moment says nothing of when it is done. Other devices are
    waited for.
    """

    def __init__(self, device: str) -> None:
        """Waits for the device: from now on its time and the process's are compared."""
        self._device = device
        synchronize(device)
        self._zero_s = time.perf_counter()
        self._zero = self.mark()

    def mark(self) -> Mark:
        """Now, behind all the work that the device has been given."""
        if not self._device.startswith("cuda"):
            synchronize(self._device)
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: Mark) -> None:
        """Until the device has come by the mark."""
        if not isinstance(mark, float):
            mark.synchronize()

    def at(self, mark: Mark) -> float:
        """When that was; waits for it."""
        if isinstance(mark, float):
            return mark
        mark.synchronize()
        assert not isinstance(self._zero, float)
        return self._zero_s + float(self._zero.elapsed_time(mark)) / 1e3
