"""Write the kept figures of benchmarks/store.py as tables into a page, between its two marks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

from machine import RESULTS, machine, slug_of

BEGIN, END = "<!-- made by benchmarks/store.py --page -->", "<!-- end -->"

_CODECS = (
    "| entropy, nats | codec | bytes | ids | values | label | tokens | KL, nats | gradient error "
    "| encode | decode | host part |"
)
_BOUNDS = "| entropy, nats | codec | ids | any K of V | by frequency | not twice | values | each rank by itself |"
_OTHERS = "| layout | bytes | KL, nats | over the kept ids alone | gradient error | encode | decode |"


def fill_page(page: Path) -> None:
    """Replace the text between the page's marks by the tables."""
    found = json.loads((RESULTS / f"store-codecs-{slug_of(machine('cpu')['device'])}.json").read_text())
    text = page.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables(found['figures'])}\n{END}{after}")


def tables(figures: list[dict[str, Any]]) -> str:
    """Return, for each vocabulary, tables of capgap's codecs, their bounds, and other layouts at the middle entropy."""
    parts = []
    for vocab_size in dict.fromkeys(entry["vocab_size"] for entry in figures):
        of = [entry for entry in figures if entry["vocab_size"] == vocab_size]
        ours = [entry for entry in of if "ids_uniform_bytes" in entry]
        others = [entry for entry in of if entry not in ours and entry["regime"] == "medium"]
        parts += [
            f"A vocabulary of {vocab_size:,} ids:\n",
            _table(_CODECS, [_codec_row(entry) for entry in ours]),
            "What is stored beside what simple models would take, bytes a token:\n",
            _table(_BOUNDS, [_bounds_row(entry) for entry in ours]),
            f"Other layouts of the rows at {others[0]['entropy_nats']} nats:\n",
            _table(_OTHERS, [_other_row(entry) for entry in others]),
        ]
    return "\n".join(parts)


def _table(head: str, rows: list[list[str]]) -> str:
    rule = "|" + "---|" * head.count(" |")
    return "\n".join([head, rule, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _codec_row(entry: dict[str, Any]) -> list[str]:
    sizes = [f"{entry[name]:.1f}" for name in ("bytes_per_token", "ids_bytes", "values_bytes", "label_bytes")]
    return [
        f"{entry['entropy_nats']:.2f}",
        f"`{entry['codec']}`",
        *sizes,
        f"{entry['tokens_bytes']:.1f}",
        *_losses(entry),
        *(_speed(entry, way) for way in ("encode", "decode", "host_part")),
    ]


def _bounds_row(entry: dict[str, Any]) -> list[str]:
    names = ("ids_bytes", "ids_uniform_bytes", "ids_unigram_bytes", "ids_unigram_excluding_bytes", "values_bytes")
    return [
        f"{entry['entropy_nats']:.2f}",
        f"`{entry['codec']}`",
        *(f"{entry[name]:.1f}" for name in names),
        "" if entry["values_order_0_bytes"] is None else f"{entry['values_order_0_bytes']:.1f}",
    ]


def _other_row(entry: dict[str, Any]) -> list[str]:
    kl, gradient = _losses(entry) if "kl_nats" in entry else ("", "")
    alone = f"{entry['kl_renormalised_nats']:.1e}" if "kl_renormalised_nats" in entry else ""
    speeds = [_speed(entry, way) for way in ("encode", "decode")]
    return [entry["codec"], f"{entry['bytes_per_token']:.0f}", kl, alone, gradient, *speeds]


def _losses(entry: dict[str, Any]) -> tuple[str, str]:
    if not entry.get("kl_nats"):
        return "0", "0"
    return f"{entry['kl_nats']:.1e}", f"{entry['gradient_error']:.4f}"


def _speed(entry: dict[str, Any], way: str) -> str:
    """Return millions of tokens per second of one core, with the fastest repeat in brackets."""
    if f"{way}_tokens_per_cpu_s" not in entry:
        return ""
    median = entry[f"{way}_tokens_per_cpu_s"] / 1e6
    fastest = entry.get(f"{way}_fastest_tokens_per_cpu_s")
    return f"{median:.2f}" if fastest is None else f"{median:.2f} ({fastest / 1e6:.2f})"
