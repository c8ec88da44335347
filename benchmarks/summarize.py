"""From the raw results of ``speed.py`` to summary.json, and to the tables and plots of docs/performance.md.

    python benchmarks/summarize.py                       # benchmarks/results/speed*/, docs/performance.md
    python benchmarks/summarize.py --results DIR --docs FILE

The newest measurement of each setting counts. What was not measured stands in the summary with ``value`` null: nothing
is guessed. Only what stands between ``<!-- speed:NAME -->`` and ``<!-- /speed:NAME -->`` in the document is rewritten.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from summary_rows import Measured, Row, newest, read, summary
from summary_tables import tables

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"klein": (51.0, 31.0), "dev": (0.41, 0.233)}
"""A step's floor with every part at its measured ceiling: bf16, and fp8 linears."""


def document(text: str, measured: Sequence[Measured], rows: Sequence[Row]) -> str:
    """``text`` with what stands between each pair of markers made anew."""
    for name, table in tables(measured, rows).items():
        start, end = f"<!-- speed:{name} -->", f"<!-- /speed:{name} -->"
        pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
        text = pattern.sub(f"{start}\n{table}\n{end}".replace("\\", r"\\"), text)
    return text


def plots(measured: Sequence[Measured], folder: Path) -> list[Path]:
    """Draw what was measured; returns the files."""
    from speed_plots import image_plot, sizes_plot, steps_plot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        steps_plot(newest(measured, "klein"), newest(measured, "dev"), FLOORS, folder / "performance_steps.svg"),
        image_plot(newest(measured, "image"), folder / "performance_image.svg"),
        sizes_plot(newest(measured, "sizes"), folder / "performance_sizes.svg"),
    ]
    return [path for path in drawn if path is not None]


def main() -> int:
    """Read, summarize, write; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--tiny", action="store_true", help="use dry runs, too")
    given = parser.parse_args()
    measured = read(sorted(given.results.glob("speed*/")), given.tiny)
    rows = summary(measured)
    target = given.results / "summary.json"
    target.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if given.docs.exists():
        text = given.docs.read_text(encoding="utf-8")
        given.docs.write_text(document(text, measured, rows), encoding="utf-8")
    written = [target, *plots(measured, given.docs.parent / "images")]
    known = sum(row["value"] is not None for row in rows)
    print(f"{len(rows)} rows ({known} measured): {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
