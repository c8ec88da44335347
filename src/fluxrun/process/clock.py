"""Points in time of what a device does, by the process's own clock: on a GPU nothing waits for one to be noted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeAlias

from fluxrun.process.device import synchronize

if TYPE_CHECKING:
    import torch

DRIFTS_AFTER_S = 10.0
"""A GPU's clock and the process's may differ by 50 millionths: after this long by half a millisecond."""

Mark: TypeAlias = "float | torch.cuda.Event"
"""A point in time: an event in a GPU's queue, or the clock's seconds."""


class DeviceClock:
    """Tells when a device came by a point in its work, in seconds as ``time.perf_counter`` gives them.

    A GPU is only handed its work: what the clock says at that moment says nothing of when it is done. Other devices are
    waited for.
    """

    def __init__(self, device: str, before: DeviceClock | None = None) -> None:
        """Waits for the device: from now on its time and the process's are compared.

        With a clock from ``before`` they are compared through that one, and a busy device is not waited for, unless
        that goes back so far that the two may have drifted apart.
        """
        self._device = device
        if before is not None and time.perf_counter() - before._compared_s > DRIFTS_AFTER_S:
            before = None
        if before is None:
            synchronize(device)
        self._before = before
        self._zero_s = time.perf_counter()
        self._compared_s: float = before._compared_s if before is not None else self._zero_s
        """When the device and the process were last at the same point."""
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
        if self._before is not None:
            self._zero_s, self._before = self._before.at(self._zero), None
        return self._zero_s + float(self._zero.elapsed_time(mark)) / 1e3
