"""Fill the tables of docs/results/low-bit.md with means over seeds from the results of benchmarks/low_bit.py.

python benchmarks/low_bit_page.py
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

from machine import RESULTS
from page_tables import Row, interval, with_tables
from result_lines import Results, one_measurement

PAGE = Path(__file__).parents[1] / "docs" / "results" / "low-bit.md"
PTQ, QAT, ONLINE = "PTQ", "QAT, cross-entropy", "QAD, online"
TAILS = ("ghost", "drop", "renorm", "label")
NAMES = (PTQ, QAT, ONLINE, *(f"QAD, sampled, n = {n}" for n in (50, 25)), *(f"QAD, top-64, {tail}" for tail in TAILS))

_HEAD = (
    "student",
    "bytes/token",
    "perplexity",
    "KL to the teacher, nats",
    "won back of the KL, % of online",
    "won back of the loss, % of online",
    "CPU s",
    "peak memory, GB",
    "seeds",
)


def main() -> None:
    """Write the page with its tables filled in."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    PAGE.write_text(filled(PAGE.read_text()))


def filled(page: str) -> str:
    """Return the page with its tables made from the largest measurement."""
    same = one_measurement(Results(RESULTS / "low-bit.jsonl").lines, but="format")
    elsewhere = [one for one in Results(RESULTS / "low-bit-other-text.jsonl").lines if one["about"] in _abouts(same)]
    return with_tables(page, "low_bit_page.py", tables(same) | {"other text": other_text_table(elsewhere)})


def tables(lines: Sequence[dict[str, Any]]) -> dict[str, list[Row]]:
    """Return each format's table, one row per arm; the number after +- is half the 95 % interval over seeds."""
    made: dict[str, list[Row]] = {}
    for name in dict.fromkeys(line["about"]["format"]["format"] for line in lines):
        own = [line for line in lines if line["about"]["format"]["format"] == name]
        teacher = ("the teacher itself", "", f"{math.exp(own[0]['teacher_loss']):.2f}", "0", *[""] * 5)
        rows = [_row(arm, own) for arm in NAMES if any(line["arm"] == arm for line in own)]
        made[name] = [_HEAD, ("---", *["---:"] * (len(_HEAD) - 1)), teacher, *rows]
    return made


def other_text_table(lines: Sequence[dict[str, Any]]) -> list[Row]:
    """Return one row per format and arm: loss and KL on another kind of text than that of the training."""
    head = ("format", "student", "loss, nats", "KL to the teacher, nats", "seeds")
    rows: list[Row] = [head, ("---", "---", *["---:"] * 3)]
    if lines:
        rows.append(("", "the teacher itself", f"{lines[0]['teacher_loss']:.4f}", "0", ""))
    for about in _abouts(lines):
        own = [line for line in lines if line["about"] == about]
        for arm in (name for name in NAMES if any(line["arm"] == name for line in own)):
            found = [[line[name] for line in own if line["arm"] == arm] for name in ("loss", "kl")]
            figures = (interval(values, 4) for values in found)
            rows.append((about["format"]["format"], arm, *figures, str(len(found[0]))))
    return rows


def _abouts(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the distinct settings (`about`) of the lines, in their order."""
    return [line["about"] for i, line in enumerate(lines) if line["about"] not in [one["about"] for one in lines[:i]]]


def won_back(lines: Sequence[dict[str, Any]], arm: str, quantity: str) -> list[float]:
    """Return, for each seed, the arm's fall from PTQ as a share of the fall by online distillation.

    Args:
        lines: Results of one format.
        arm: The arm whose fall is measured.
        quantity: `loss` on held-out text, or `kl` to the teacher.
    """
    ptq = fmean([_value(line, quantity) for line in lines if line["arm"] == PTQ] or [math.nan])
    online = {line["seed"]: _value(line, quantity) for line in lines if line["arm"] == ONLINE}
    return [
        (ptq - _value(line, quantity)) / (ptq - online[line["seed"]])
        for line in lines
        if line["arm"] == arm and line["seed"] in online and online[line["seed"]] != ptq
    ]


def _row(arm: str, lines: Sequence[dict[str, Any]]) -> Row:
    own = [line for line in lines if line["arm"] == arm]
    size = own[0]["bytes_per_token"]
    took_s = [line["cpu_s"] for line in own if line["cpu_s"] is not None]
    shares = ([100 * share for share in won_back(lines, arm, quantity)] for quantity in ("kl", "loss"))
    return (
        arm,
        "" if size is None else f"{size:.1f}",
        interval([line["perplexity"] for line in own], 2),
        interval([line["against_teacher"]["kl"] for line in own], 4),
        *(interval(one, 1) for one in shares),
        f"{fmean(took_s):.0f}" if took_s else "",
        f"{max(line['peak_bytes'] for line in own) / 1e9:.1f}",
        str(len(own)),
    )


def _value(line: dict[str, Any], quantity: str) -> float:
    return float(line["heldout_loss"] if quantity == "loss" else line["against_teacher"]["kl"])


if __name__ == "__main__":
    main()
