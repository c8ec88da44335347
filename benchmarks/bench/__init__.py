"""What the commands beside this package share; fluxrun is the one of this checkout, whether or not it is installed."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SEARCHED = [str(ROOT / "src"), str(ROOT / "benchmarks")]
"""Where this checkout's modules are: on the search path here, and of every process that is started."""

sys.path[:0] = [folder for folder in SEARCHED if folder not in sys.path]
