"""``fluxrun`` in a process whose GPU memory is limited, as on a smaller card: ``speed_capped.py GB override …``."""

from __future__ import annotations

import sys


def limit_memory(gigabytes: float) -> None:
    """Hold torch's allocator to so many GB (2**30 bytes), where there is a GPU."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 2**30 / total))


def main() -> None:
    """Limit the memory, then be the ``fluxrun`` command."""
    limit_memory(float(sys.argv.pop(1)))
    from fluxrun.__main__ import main as fluxrun

    fluxrun()


if __name__ == "__main__":
    main()
