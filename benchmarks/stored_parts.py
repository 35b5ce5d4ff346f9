"""The bytes of the parts of a shard's member, each part compressed alone."""

from __future__ import annotations

import pyarrow as pa
import zstandard

# The parts, with the names of their columns.
PARTS = {
    "tokens": ("tokens", "starts", "mask"),
    "ids": ("ids", "repeated", "once"),
    "values": ("counts", "num_repeated", "logprobs", "steps", "quads", "escapes", "top_k", "tail"),
    "label": ("label",),
}


def parts_of(member: bytes) -> dict[str, int]:
    """Return the bytes of a member's parts, where each column is compressed alone."""
    parts = dict.fromkeys(PARTS, 0)
    batch = pa.ipc.open_stream(zstandard.ZstdDecompressor().decompress(member)).read_next_batch()
    for column in batch.schema.names:
        stem = column.rstrip("0123456789").rstrip("_")
        (part,) = (name for name, stems in PARTS.items() if stem in stems)
        parts[part] += len(zstandard.compress(batch[column].values.to_numpy().tobytes(), 3))
    return parts
