"""``fluxrun`` in a process whose GPU memory is limited, as on a smaller card: ``speed_capped.py GB override …``."""

from __future__ import annotations

import sys


def main() -> None:
    """Limit torch's allocator to GB (2**30 bytes), then be the ``fluxrun`` command."""
    import torch

    budget_gb = float(sys.argv.pop(1))
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gb * 2**30 / total))
    from fluxrun.__main__ import main as fluxrun

    fluxrun()


if __name__ == "__main__":
    main()
