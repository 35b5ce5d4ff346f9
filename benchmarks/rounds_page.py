"""Fills the table of docs/rounds.md with the lines of benchmarks/rounds.py: means over seeds, and paired differences.

python benchmarks/rounds_page.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

# found beside this file also where Python is told not to look there: -P, PYTHONSAFEPATH
sys.path.insert(0, str(Path(__file__).parent))

from page_tables import Row, interval, with_tables
from result_lines import Results

PAGE = Path(__file__).parents[1] / "docs" / "rounds.md"
LINES = Path(__file__).parent / "results" / "rounds-addition.jsonl"
ARMS = ("rounds", "policy_gradient", "off_policy", "sft", "online")

_HEAD = ("arm", "right, %", "rounds - arm, points", "teacher tokens", "student tokens", "seeds")


def main() -> None:
    """Write the page anew."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    PAGE.write_text(filled(PAGE.read_text()))


def filled(page: str) -> str:
    """The page with its table made anew."""
    return with_tables(page, "rounds_page.py", {"addition": table(Results(LINES).lines)})


def table(lines: Sequence[dict[str, Any]]) -> list[Row]:
    """A row an arm; what follows +- is half of the 95 % interval over seeds."""
    found = {(one["arm"], one["seed"]): one for one in lines}
    rows: list[Row] = [_HEAD, ("---", *["---:"] * 5)]
    for arm in ARMS:
        own = [one for one in lines if one["arm"] == arm]
        if not own:
            continue
        pairs = [
            found["rounds", one["seed"]]["right"] - one["right"] for one in own if ("rounds", one["seed"]) in found
        ]
        gap = "" if not pairs or arm == "rounds" else interval([100 * pair for pair in pairs], 1, "+")
        tokens = (f"{fmean(one[name] for one in own):,.0f}" for name in ("teacher_tokens", "student_tokens"))
        rows.append((f"`{arm}`", interval([100 * one["right"] for one in own], 1), gap, *tokens, str(len(own))))
    return rows


if __name__ == "__main__":
    main()
