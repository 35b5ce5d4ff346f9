"""Fill the tables of docs/speed.md from the figures in benchmarks/results: the costs of a corpus and a student's step.

python benchmarks/speed_page.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

from machine import every_kept
from page_tables import Row, with_tables

PAGE = Path(__file__).parents[1] / "docs" / "speed.md"

_WHEN = ("before", "after")


def main() -> None:
    """Write the page with its tables filled in."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    PAGE.write_text(filled(PAGE.read_text()))


def filled(page: str) -> str:
    """Return the page with its tables made from the figures."""
    tables = {
        "memory": _memory(),
        "corpus": _corpus(),
        "manifest": _manifest(),
        "step": _step(),
        "before": _before(),
        "loss": _loss(),
    }
    return with_tables(page, "speed_page.py", tables)


def _memory() -> list[Row]:
    rows: list[Row] = [("text, MB", "most that is resident, MB", "seconds", "machine"), ("---:", "---:", "---:", "---")]
    for device, kept in every_kept("corpus"):
        for one in kept["figures"]["memory"]:
            rows.append((f"{one['text_mb']:,}", f"{one['peak_resident_mb']:.0f}", f"{one['seconds']:.0f}", device))
    return rows


def _corpus() -> list[Row]:
    rows: list[Row] = [("by", "processes", "tokens/s", "machine"), ("---", "---:", "---:", "---")]
    for device, kept in every_kept("corpus"):
        for one in kept["figures"]["speed"]:
            rows.append((one["by"], str(one["num_processes"]), f"{one['tokens_per_s']:,}", device))
    return rows


def _manifest() -> list[Row]:
    rows: list[Row] = [
        ("shards", "read, CPU s", "held against its seal, CPU s", "machine"),
        ("---:", "---:", "---:", "---"),
    ]
    for device, kept in every_kept("corpus"):
        one = kept["figures"]["manifest"]
        rows.append((f"{one['num_shards']:,}", f"{one['open_cpu_s']:.1f}", f"{one['seal_cpu_s']:.1f}", device))
    return rows


_STEP_HEAD: list[Row] = [
    ("targets", "precision", "CPU ms a step", "over cross-entropy", "quartiles", "waits for data", "machine"),
    ("---", "---", "---:", "---:", "---:", "---:", "---"),
]


def _step() -> list[Row]:
    rows = list(_STEP_HEAD)
    for device, kept in every_kept("train-step"):
        for precision, found in kept["figures"].get("precisions", {}).items():
            for name, way in found["ways"].items():
                rows.append(_step_row(name, precision, way, device))
    return rows


def _step_row(name: str, precision: str, way: dict[str, Any], device: str) -> Row:
    low, high = way["ratio_quartiles"]
    spread = "" if low == high else f"{low:.2f} to {high:.2f}"
    share = f"{100 * way['data_wait_fraction']:.2f} %"
    return name, f"`{precision}`", f"{way['ms']:,.0f}", f"{way['ratio']:.3f}", spread, share, device


def _before() -> list[Row]:
    """Return the table of the same step by an earlier and a later commit, on one machine."""
    rows: list[Row] = [
        (
            "what",
            "targets",
            "precision",
            "ms before",
            "ms after",
            "ratio before",
            "ratio after",
            "MB before",
            "MB after",
        ),
        ("---", "---", "---", *["---:"] * 6),
    ]
    for _, kept in every_kept("step-before-and-after"):
        for what, runs in kept.items():
            if what.split(",")[0] not in ("real shape", "toy"):
                continue
            pairs = [_listed(runs["before"]), _listed(runs["after"])]
            for before, after in zip(*pairs, strict=True):
                for precision, found in before["precisions"].items():
                    for name, old in found["ways"].items():
                        new = after["precisions"][precision]["ways"][name]
                        figures = [
                            f"{old['ms']:,.0f}",
                            f"{new['ms']:,.0f}",
                            f"{old['ratio']:.3f}",
                            f"{new['ratio']:.3f}",
                        ]
                        figures += [f"{old['peak_mb']:,.0f}", f"{new['peak_mb']:,.0f}"]
                        rows.append((what, name, f"`{precision}`", *figures))
    return rows


def _loss() -> list[Row]:
    """Return the table of the loss alone, forward and backward, at every shape."""
    rows: list[Row] = [
        ("rows", "hidden", "vocabulary", "kept ids", "way", "ms before", "ms after", "ratio before", "ratio after"),
        ("---:", "---:", "---:", "---:", "---", *["---:"] * 4),
    ]
    for _, kept in every_kept("step-before-and-after"):
        shapes = kept["loss alone, one thread, the other core busy"]
        for before, after in zip(shapes["before"], shapes["after"], strict=True):
            shape = tuple(f"{before[name]:,}" for name in ("num_rows", "hidden", "vocab", "top_k"))
            for name, old in before["ways"].items():
                new = after["ways"].get(name)
                if isinstance(old, dict) and isinstance(new, dict):
                    ratios = (f"{old['time_ratio']:.3f}", f"{new['time_ratio']:.3f}")
                    rows.append((*shape, name, f"{old['ms']:.1f}", f"{new['ms']:.1f}", *ratios))
    return rows


def _listed(runs: Any) -> list[Any]:
    return runs if isinstance(runs, list) else [runs]


if __name__ == "__main__":
    main()
