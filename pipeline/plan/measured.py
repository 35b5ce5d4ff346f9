"""Measured bytes per token, kept in `measured.json`, which benchmarks/plan_tables.py writes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from capgap.pipeline.store.codec import SAMPLED, TOPK_CODECS
from capgap.schemas.plan import Figure
from capgap.schemas.run_cache import CacheSettings, RecordingName

# The size depends on how sharp the teacher's distributions are; natural text at temperature 1 takes the most bytes of
# all that were measured.
_REGIME = "natural"


def cache_bytes_per_token(settings: CacheSettings, vocab_size: float | None) -> Figure:
    """Return the bytes that a cache takes per token, all recordings together.

    The value was measured for a teacher on natural text; its source names the range over sharper distributions.
    """
    found = [_of_recording(settings, name, vocab_size) for name in settings.recordings]
    note = "; tails at extra temperatures not counted" if settings.extra_temperatures else ""
    source = "; ".join(part.source for part in found)
    return Figure(
        value=sum(part.value or 0 for part in found), source=f"{source}{note} ({_table()['cache']['source']})"
    )


def text_bytes_per_token(vocab_size: float | None) -> Figure:
    """Return the bytes of text per token of a trained tokenizer with about that vocabulary size."""
    return _of_corpus("text_bytes_per_token", vocab_size)


def corpus_bytes_per_token(vocab_size: float | None) -> Figure:
    """Return the bytes of disk that a packed token takes, with its document start and its loss mask."""
    return _of_corpus("stored_bytes_per_token", vocab_size)


def _of_recording(settings: CacheSettings, name: RecordingName, vocab_size: float | None) -> Figure:
    table = _table()["cache"]
    codec = SAMPLED if name == "sampled" else TOPK_CODECS[settings.stored_profile or ""]
    measured = table["num_samples"] if name == "sampled" else table["top_k"]
    asked = settings.num_ids(name)
    rows = [row for row in table["rows"] if row["codec"] == codec]
    nearest = _nearest(rows, vocab_size)
    alike = [row for row in rows if row["vocab_size"] == nearest["vocab_size"]]
    (usual,) = (row["bytes_per_token"] for row in alike if row["regime"] == _REGIME)
    scale = asked / measured
    low, high = (choose(row["bytes_per_token"] for row in alike) * scale for choose in (min, max))
    unit = "samples" if name == "sampled" else "top-k tokens"
    scaled = "" if asked == measured else f", in proportion from {measured}"
    source = (
        f"{codec}, {asked} {unit}{scaled}: {usual * scale:.1f} bytes/token, {low:.1f} to {high:.1f} by how sharp the "
        f"teacher is, measured at a vocabulary of {nearest['vocab_size']:,}"
    )
    return Figure(value=usual * scale, source=source)


def _of_corpus(name: str, vocab_size: float | None) -> Figure:
    table = _table()["corpus"]
    row = _nearest(table["rows"], vocab_size)
    source = (
        f"{row[name]:.2f} bytes/token, measured at a vocabulary of {row['vocab_size']:,} on Python's own text "
        f"({table['source']})"
    )
    return Figure(value=row[name], source=source)


def _nearest(rows: Sequence[dict[str, Any]], vocab_size: float | None) -> dict[str, Any]:
    """Return the row whose vocabulary size is nearest as a ratio.

    Where the size is not known, it is the row of the largest vocabulary, because given tokenizers are large.
    """
    if vocab_size is None:
        return max(rows, key=lambda row: int(row["vocab_size"]))
    return min(rows, key=lambda row: abs(math.log(row["vocab_size"] / max(vocab_size, 1))))


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name("measured.json").read_text())
    return table
