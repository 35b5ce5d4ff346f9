"""The lines of benchmarks/quality.py as a table: shares of the gain, paired by seed.

Legend: S seeds.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

# found beside this file also where Python is told not to look there: -P, PYTHONSAFEPATH
sys.path.insert(0, str(Path(__file__).parent))

from quality_arms import CROSS_ENTROPY, ONLINE, arms

BEGIN, END = "<!-- made by benchmarks/quality.py --page -->", "<!-- end -->"

_HEAD = (
    "| targets | bytes/token | ids/token | held-out loss, nats | share of the gain, % | KL to the teacher, nats "
    "| share of that gain, % | seeds |"
)


def fill_page(page: Path, lines: list[dict[str, Any]]) -> None:
    """Replace what stands between the marks."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{table(lines)}\n{END}{after}")


def table(lines: list[dict[str, Any]]) -> str:
    """A row an arm; what follows +- is the standard error over seeds."""
    rows = [_HEAD, "|---|" + "---:|" * (_HEAD.count(" |") - 1)]
    for arm in arms():
        own = {one["seed"]: one for one in lines if one["arm"] == arm.name}
        if not own:
            continue
        some = next(iter(own.values()))
        cells = [
            arm.name,
            "" if some["bytes_per_token"] is None else f"{some['bytes_per_token']:.1f}",
            "" if some["ids_per_token"] is None else f"{some['ids_per_token']:.1f}",
            _mean([_loss(one) for one in own.values()], 4),
            _mean(shares(lines, arm.name, _loss), 1, 100),
            _mean([kl_of(one) for one in own.values()], 4),
            _mean(shares(lines, arm.name, kl_of), 1, 100),
            str(len(own)),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def shares(lines: list[dict[str, Any]], arm: str, of: Any) -> list[float]:
    """Of the fall from cross-entropy to online, how much the arm has: one a seed that has all three."""
    by = {(one["arm"], one["seed"]): of(one) for one in lines}
    found = []
    for seed in sorted({seed for _, seed in by}):
        most, least, own = (by.get((name, seed)) for name in (CROSS_ENTROPY, ONLINE, arm))
        if most is not None and least is not None and own is not None:
            found.append((most - own) / (most - least))
    return found


def _loss(line: dict[str, Any]) -> float:
    return float(line["heldout_loss"])


def kl_of(line: dict[str, Any]) -> float:
    """The KL to the teacher that a training ended with."""
    return float(line["against_teacher"]["kl"])


def _mean(values_S: list[float], digits: int, scale: float = 1.0) -> str:
    if not values_S:
        return ""
    mean = f"{scale * statistics.mean(values_S):.{digits}f}"
    if len(values_S) < 2:
        return mean
    return f"{mean} +- {scale * statistics.stdev(values_S) / math.sqrt(len(values_S)):.{digits}f}"
