"""``python -m fluxrun``, and the ``fluxrun`` command: the imports are interruptible too."""

from __future__ import annotations

import signal
import sys
import time

from fluxrun.errors import Interrupted
from fluxrun.process import spans
from fluxrun.process.ending import leave, leave_in_order
from fluxrun.process.signals import EXIT_CODES, Interrupts
from fluxrun.process.watch import watched
from fluxrun.startup.owner import own_process


def main() -> None:
    """Run the command line, in a process of its own; Ctrl+C while it is still being imported ends in one line too."""
    own_process()
    spans.add("interpreter", spans.process_start(), time.perf_counter())
    with watched(), Interrupts() as interrupts:
        code = _run(interrupts)
        if code in EXIT_CODES.values():
            leave(code)
    for number in EXIT_CODES:  # all is done: a signal now just ends the process
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    leave_in_order(code)


def _run(interrupts: Interrupts) -> int:
    try:
        with interrupts.immediate():
            if any(word.partition("=")[0] == "--server" for word in sys.argv[1:]):  # nothing that draws is imported
                from fluxrun.serving.client import main as draw_there

                return draw_there(sys.argv[1:])
            with spans.span("import"):
                from fluxrun.cli.app import main as run

            run()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else bool(ended.code)
    except (KeyboardInterrupt, Interrupted):
        print(interrupts.error(), file=sys.stderr)
        return interrupts.error().exit_code
    return 0


if __name__ == "__main__":
    main()
