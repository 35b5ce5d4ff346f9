"""Amounts as people read them."""

from __future__ import annotations


def bytes_text(num_bytes: float) -> str:
    """A number of bytes in the unit in which it has a figure before the point."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
