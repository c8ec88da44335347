"""What the commands beside this package share; fluxrun is the one of this checkout, whether or not it is installed."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))
