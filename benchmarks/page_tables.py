"""Pages whose tables are made by a script: each stands between a mark that names script and table, and an end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

END = "<!-- end -->"

Row = Sequence[str]


def mark(script: str, name: str) -> str:
    """What stands before a table."""
    return f"<!-- made by benchmarks/{script}: {name} -->"


def with_tables(page: str, script: str, tables: Mapping[str, Sequence[Row]]) -> str:
    """The page with these tables in the place of those that stand there; a table's first row is its head."""
    for name, rows in tables.items():
        begin = mark(script, name)
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        before, rest = page.split(begin)
        page = f"{before}{begin}\n\n{table}\n\n{END}{rest.partition(END)[2]}"
    return page
