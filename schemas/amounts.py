"""Amounts in a form that people read easily."""

from __future__ import annotations


def bytes_text(num_bytes: float) -> str:
    """Return a number of bytes as text, in the largest unit of kB, MB, GB and TB in which it is at least 1."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
