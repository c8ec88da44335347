"""From the raw results of ``speed.py`` to summary.json, and to the tables and plots of docs/performance.md.

    python benchmarks/summarize.py                       # benchmarks/results/speed*/, docs/performance.md
    python benchmarks/summarize.py --results DIR --docs FILE

The newest measurement of each setting counts. What was not measured stands in the summary with ``value`` null: nothing
is guessed. Only what stands between ``<!-- speed:NAME -->`` and ``<!-- /speed:NAME -->`` in the document is rewritten.
"""

import argparse
import json
from pathlib import Path

from bench import ROOT, plots
from bench.results import read
from bench.summary import document, summary


def main() -> None:
    """Read, summarize, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "performance.md")
    given = parser.parse_args()
    rows = read(sorted(given.results.glob("speed*/")))
    entries = summary(rows)
    target = given.results / "summary.json"
    target.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    given.docs.write_text(document(given.docs.read_text(encoding="utf-8"), rows), encoding="utf-8")
    images = given.docs.parent / "images"
    images.mkdir(exist_ok=True)
    written = [target, *plots.write(rows, images)]
    print(f"{len(entries)} rows: {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()
