"""From raw results (``speed.py``, ``next_tenth.py``) to summary.json, and to docs/performance.md's tables and plots.

    python benchmarks/summarize.py                       # benchmarks/results/speed*/, docs/performance.md
    python benchmarks/summarize.py --results DIR --docs FILE

The newest measurement of each setting counts. What was not measured stands in the summary with ``value`` null: nothing
is guessed. Only what stands between ``<!-- speed:NAME -->`` and ``<!-- /speed:NAME -->`` in the document is rewritten.
"""

import argparse
import json
from pathlib import Path

from bench import ROOT, next_tenth, plots
from bench.results import read
from bench.summary import document, summary, tables


def main() -> None:
    """Read, summarize, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "performance.md")
    given = parser.parse_args()
    rows = read(sorted(given.results.glob("speed*/")))
    judged = next_tenth.entries(given.results)
    entries = [*summary(rows), *judged]
    target = given.results / "summary.json"
    target.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = document(given.docs.read_text(encoding="utf-8"), {**tables(rows), "next_tenth": next_tenth.table(judged)})
    given.docs.write_text(text, encoding="utf-8")
    images = given.docs.parent / "images"
    images.mkdir(exist_ok=True)
    written = [target, *plots.write(rows, images)]
    print(f"{len(entries)} rows: {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()
