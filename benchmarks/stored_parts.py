"""What the parts of a member of a shard take, each compressed alone."""

from __future__ import annotations

import pyarrow as pa
import zstandard

# The parts of a table's row, by the names of columns.
PARTS = {
    "tokens": ("tokens", "starts", "mask"),
    "ids": ("ids", "repeated", "once"),
    "values": ("counts", "num_repeated", "logprobs", "steps", "quads", "escapes", "top_k", "tail"),
    "label": ("label",),
}


def parts_of(member: bytes) -> dict[str, int]:
    """Bytes of a member's columns, each compressed alone, by part."""
    parts = dict.fromkeys(PARTS, 0)
    batch = pa.ipc.open_stream(zstandard.ZstdDecompressor().decompress(member)).read_next_batch()
    for column in batch.schema.names:
        stem = column.rstrip("0123456789").rstrip("_")
        (part,) = (name for name, stems in PARTS.items() if stem in stems)
        parts[part] += len(zstandard.compress(batch[column].values.to_numpy().tobytes(), 3))
    return parts
