"""The table of the results of benchmarks/architectures.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- made by benchmarks/architectures.py --page -->", "<!-- end -->"

# nats of rms difference above which the cache stage warns (pipeline/cache/cross_check.py)
_DIFFERS_NATS = 1e-3

_HEAD = "| architecture | class in transformers | rms, nats | largest, nats | same top token | one matrix gone |"


def fill_page(page: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the text between the page's marks by the table."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n{END}{after}")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table with one row per architecture, also for faults; a line above it names versions and machine."""
    lines = [f"{_measured_on(rows)}\n", _HEAD, "|---|---|---:|---:|---:|---|"]
    for row in rows:
        cells = [row["name"], f"`{row['class']}`" if "class" in row else ""]
        if "fault" in row:
            cells += [row["fault"].replace("|", "/").replace("<", "&lt;"), "", "", ""]
        else:
            cells += [
                _rms(row["rms_nats"]),
                f"{row['max_nats']:.1e}",
                f"{row['same_top']:.2%}",
                "refused" if row["refuses_incomplete"] else "**accepted**",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rms(nats: float) -> str:
    return f"**{nats:.1e}, another model**" if nats > _DIFFERS_NATS else f"{nats:.1e}"


def _measured_on(rows: list[dict[str, Any]]) -> str:
    """Say how many architectures agree, and name versions and machines, each once."""
    versions = sorted({", ".join(f"{name} {number}" for name, number in row["versions"].items()) for row in rows})
    machines = sorted({row["machine"]["device"] for row in rows})
    passed = sum("fault" not in row and row["rms_nats"] <= _DIFFERS_NATS for row in rows)
    measured = f"{'; '.join(versions)}; {', '.join(machines)}, float32"
    return f"{passed} of {len(rows)} architectures go through and agree; {measured}:"
