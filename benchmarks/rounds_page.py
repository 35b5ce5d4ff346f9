"""Fill the tables of docs/rounds.md with means over seeds from the results of benchmarks/rounds.py and rounds_smol.py.

python benchmarks/rounds_page.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

from page_tables import Row, interval, with_tables
from result_lines import Results

PAGE = Path(__file__).parents[1] / "docs" / "rounds.md"
LINES = Path(__file__).parent / "results" / "rounds-addition.jsonl"
SMOL_LINES = LINES.with_name("rounds-smol.jsonl")
ARMS = ("rounds", "policy_gradient", "off_policy", "sft", "online")

_HEAD = ("arm", "right, %", "rounds - arm, points", "teacher tokens", "student tokens", "seeds")
_SMOL_HEAD = ("KL on its own text", "KL on common text", "stored logprobs off by, rms")
_TIME_HEAD = ("round 0, wall s", "round 0, CPU s", "later round, wall s", "later round, CPU s")
_PARTS = {"generate": "write (`generate`)", "cache": "score (`cache`)", "train": "train (`train`)"}
_UNITS = ("wall_s", "cpu_s")


def main() -> None:
    """Write the page with its tables filled in."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    PAGE.write_text(filled(PAGE.read_text()))


def filled(page: str) -> str:
    """Return the page with its tables made from the results."""
    tables = {"addition": table(Results(LINES).lines)} | smol_tables(Results(SMOL_LINES).lines)
    return with_tables(page, "rounds_page.py", tables)


def table(lines: Sequence[dict[str, Any]]) -> list[Row]:
    """Return one row per arm; the number after +- is half of the 95 % interval over seeds."""
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


def smol_tables(lines: Sequence[dict[str, Any]]) -> dict[str, list[Row]]:
    """Return the real model's tables: how near each round's student is to the teacher, and each stage's seconds."""
    if not lines:
        return {}
    nearness: list[Row] = [("student after", *_SMOL_HEAD), ("---", *["---:"] * len(_SMOL_HEAD))]
    for number in range(len(lines[0]["kl_own_by_round"])):
        of_lines = (f"{name}_by_round" for name in ("kl_own", "kl_common", "logprob_rms"))
        own, common, rms = ([line[name][number] for line in lines] for name in of_lines)
        nearness.append((f"round {number}", _mean_and_range(own), _mean_and_range(common), f"{max(rms):.1e}"))
    times: list[Row] = [("stage", *_TIME_HEAD), ("---", *["---:"] * len(_TIME_HEAD))]
    for stage, what in _PARTS.items():
        took: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for line in lines:
            for name, one in line["took"].items():
                if name.startswith(stage + "/") and name.rpartition("/")[2].startswith("round-"):
                    took[name.endswith("/round-0")].append(one)
        cells = [f"{fmean(one[unit] for one in took[first]):.0f}" for first in (True, False) for unit in _UNITS]
        times.append((what, *cells))
    return {"smol": nearness, "smol times": times}


def _mean_and_range(values: Sequence[float]) -> str:
    mean = f"{fmean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
