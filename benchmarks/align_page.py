"""Tables of the results of benchmarks/align_quality.py: means over seeds, and differences paired by seed.

python benchmarks/align_page.py        fill in the tables of docs/how-to/another-tokenizer.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

from machine import RESULTS
from page_tables import Row, interval, mark, with_tables
from result_lines import Results, one_measurement

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "another-tokenizer.md"
CROSS_ENTROPY = "cross_entropy"
ARMS: dict[str, dict[str, Any]] = {
    CROSS_ENTROPY: {"alpha": 0.0},
    "chunks-100": {"alpha": 0.5, "temperature": 100.0},
    "projected": {"alpha": 0.2, "temperature": 100.0, "projected_weight": 1.0},
    "projected-less": {"alpha": 0.5, "temperature": 100.0, "projected_weight": 0.5},
    "chunks": {"alpha": 0.5, "temperature": 1.0},
    "chunks-reverse": {"alpha": 0.5, "temperature": 1.0, "divergence": "reverse_kl"},
    "chunks-alone": {"alpha": 1.0, "temperature": 100.0},
}
_FEW = [CROSS_ENTROPY, "chunks-100", "projected"]
# number of seeds and arms of each pair of models
PAIRS = {"bpe": (5, list(ARMS)), "gemma-smol": (3, _FEW), "smol-gemma": (3, _FEW)}
_HEAD = ("settings of the arm", "bits per byte", "cross-entropy - arm", "KL of chunks", "cross-entropy - arm", "seeds")


def main() -> None:
    """Write the page with its tables filled in."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    PAGE.write_text(filled(PAGE.read_text(), RESULTS))


def filled(page: str, results: Path) -> str:
    """Return the page with its tables made from the results."""
    tables = {pair: table(Results(results / f"align-quality-{pair}.jsonl").lines) for pair in PAIRS}
    there = {pair: rows for pair, rows in tables.items() if mark("align_page.py", pair) in page}
    return with_tables(page, "align_page.py", there)


def table(lines: Sequence[dict[str, Any]]) -> list[Row]:
    """Return one row per arm of the largest measurement; the number after +- is half the 95 % interval over seeds."""
    found = {(one["arm"], one["seed"]): one for one in one_measurement(lines)}
    rows: list[Row] = [_HEAD, ("---", *["---:"] * 5)]
    for arm, settings in ARMS.items():
        own = {seed: one for (name, seed), one in found.items() if name == arm}
        if not own:
            continue
        said = ", ".join(f"{name}: {value}" for name, value in settings.items())
        row = [f"`{said}`"]
        for measure in ("bits_per_byte", "chunk_kl"):
            pairs = [
                found[CROSS_ENTROPY, seed][measure] - one[measure]
                for seed, one in own.items()
                if (CROSS_ENTROPY, seed) in found
            ]
            row.append(interval([one[measure] for one in own.values()], 3))
            row.append("" if arm == CROSS_ENTROPY else interval(pairs, 3, "+"))
        rows.append((*row, str(len(own))))
    return rows


if __name__ == "__main__":
    main()
