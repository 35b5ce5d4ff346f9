"""Formats numbers for people."""

from __future__ import annotations

_LETTERS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def human_count(count: float) -> str:
    """Format a count with three digits and k, M, B or T for 10^3, 10^6, 10^9 or 10^12: 7544e6 is `7.54B`."""
    rounded = float(f"{count:.3g}")  # rounded first, so that 999,999 becomes 1M and not 1000k
    for size, letter in _LETTERS:
        if rounded >= size:
            return f"{rounded / size:.4g}{letter}"
    return f"{rounded:.4g}"
