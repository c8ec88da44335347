"""``python -m fluxrun``."""

from fluxrun.cli import main

if __name__ == "__main__":
    main()
