"""``python -m fluxrun``, and the ``fluxrun`` command: the imports are interruptible too."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl+C while it is still being imported ends in one line as well."""
    try:
        from fluxrun.cli.app import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
