"""Pages whose tables a script makes: each table is between a mark that names script and table, and an end mark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

END = "<!-- end -->"
# 97.5 % quantiles of Student's t, by degrees of freedom
_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Row = Sequence[str]


def mark(script: str, name: str) -> str:
    """Return the mark before a table."""
    return f"<!-- made by benchmarks/{script}: {name} -->"


def with_tables(page: str, script: str, tables: Mapping[str, Sequence[Row]]) -> str:
    """Return the page with its tables replaced by these, by name; a table's first row is its head."""
    for name, rows in tables.items():
        begin = mark(script, name)
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        before, rest = page.split(begin)
        page = f"{before}{begin}\n\n{table}\n\n{END}{rest.partition(END)[2]}"
    return page


def interval(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Return the mean and, for several values, half of its 95 % interval; `sign` "+" also puts a sign before a gain."""
    if not values:
        return ""
    mean = f"{fmean(values):{sign}.{digits}f}"
    if len(values) < 2:
        return mean
    half = _QUANTILES.get(len(values) - 1, 2.0) * stdev(values) / len(values) ** 0.5
    return f"{mean} +- {half:.{digits}f}"
