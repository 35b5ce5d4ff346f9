"""The columns of every codec. They are defined only here: the encoder, the decoder and the device use this list.

values by field --to_columns--> Arrow columns, a field of planes as several --read_values--> values by field
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capgap.pipeline.store.columns import Columns, fixed_lists, lists
from capgap.pipeline.store.planes import join_planes, num_planes, split_planes
from capgap.schemas.run_cache import Profile

SEQUENCES = "sequences-planes-1"
SAMPLED = "sampled-planes-1"
CHUNKS = "chunks-1"
TOPK_CODECS: dict[str, str] = {profile: f"topk-{profile}-1" for profile in get_args(Profile)}
TOPK = TOPK_CODECS["near-lossless"]
PROFILES = {name: profile for profile, name in TOPK_CODECS.items()}
CODECS = (SEQUENCES, SAMPLED, CHUNKS, *PROFILES)

Part = Literal["text", "ids", "weights", "tail", "label"]


@dataclass(frozen=True)
class Field:
    """One list of numbers that a codec stores of each sequence.

    Attributes:
        name: The column's name in the Arrow stream; with planes, that name and the plane's number.
        part: What the numbers describe: text, ids, weights, tail or label.
        width: How many numbers each sequence has; 0 if sequences differ in this.
        planes: How many bytes a number has, each in a column of its own; None where one column holds the numbers.
        kind: The type of a number in a column.
    """

    name: str
    part: Part
    width: int
    planes: int | None = None
    kind: type[np.unsignedinteger[Any]] = np.uint8

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the field's columns."""
        return (self.name,) if self.planes is None else tuple(f"{self.name}_{i}" for i in range(self.planes))


@dataclass(frozen=True)
class RaggedValues:
    """The numbers of a field of which sequences have different amounts.

    Attributes:
        values_D: The numbers of all sequences, one after the other.
        lengths_B: How many each sequence has.
    """

    values_D: npt.NDArray[Any]
    lengths_B: npt.NDArray[Any]


def fields_of(codec: str, seq_len: int, vocab_size: int, num_ids: int, num_extra: int = 0) -> tuple[Field, ...]:
    """Return the fields of a codec's members in their order, as docs/format.md lists them.

    Args:
        codec: Name with version.
        seq_len: L, the number of targets in a sequence.
        vocab_size: All ids are below this number.
        num_ids: n samples or K kept ids a target.
        num_extra: Number of extra temperatures.
    """
    id_planes, width = num_planes(vocab_size - 1), seq_len + 1
    bits = -(-width // 8)
    count: type[np.unsignedinteger[Any]] = np.uint8 if num_ids < 1 << 8 else np.uint16
    text = (
        Field("tokens", "text", width, id_planes),
        Field("starts", "text", bits),
        Field("mask", "text", bits),
    )
    if codec == SEQUENCES:
        return text
    if codec == CHUNKS:
        flags = -(-seq_len // 8)
        ends = (Field("chunk_ends", "label", flags), Field("chunk_kept", "label", flags))
        chunks = (*text, *ends, Field("chunk_logprobs", "label", seq_len, 4))
        projected = (
            Field("top_k", "weights", seq_len, kind=count),
            Field("ids", "ids", 0, id_planes),
            Field("logprobs", "weights", 0, 4),
            Field("tail", "tail", seq_len, 4),
        )
        return (*chunks, *projected) if num_ids else chunks
    if codec == SAMPLED:
        return (
            *text,
            Field("num_repeated", "weights", seq_len, kind=count),
            Field("counts", "weights", 0, kind=count),
            Field("repeated", "ids", 0, id_planes),
            Field("once", "ids", 0, id_planes),
            Field("label", "label", seq_len, 2),
        )
    profile, kept = PROFILES[codec], seq_len * num_ids
    targets = {
        "lossless": (Field("ids", "ids", kept, id_planes), Field("logprobs", "weights", kept, 4)),
        "near-lossless": (Field("ids", "ids", kept, id_planes), Field("steps", "weights", kept, 2)),
        "compact": (
            Field("ids", "ids", kept, id_planes),
            Field("quads", "weights", -(-kept // 4)),
            Field("escapes", "weights", 0),
        ),
        "small": (
            Field("top_k", "weights", seq_len, kind=count),
            Field("ids", "ids", 0, id_planes),
            Field("quads", "weights", 0),
            Field("escapes", "weights", 0),
        ),
    }[profile]
    fine = 4 if profile == "lossless" else 2
    tails = (Field(name, "tail", seq_len, fine) for name in ("tail", *map(tail_name, range(num_extra))))
    return (*text, *targets, *tails, Field("label", "label", seq_len, fine))


def tail_name(number: int) -> str:
    """Return the name of the field that holds the tail of extra temperature `number`."""
    return f"tail{number + 1}"


def to_columns(fields: tuple[Field, ...], values: Mapping[str, npt.NDArray[Any] | RaggedValues]) -> dict[str, pa.Array]:
    """Turn values by field, [B, width] or ragged, into the columns of one member."""
    assert {field.name for field in fields} == values.keys(), "every field has values, and nothing else has"
    columns: dict[str, pa.Array] = {}
    for field in fields:
        given = values[field.name]
        numbers = given.values_D if isinstance(given, RaggedValues) else given
        planes = [numbers.astype(field.kind, copy=False)]
        if field.planes is not None:
            planes = split_planes(numbers, field.planes)
        for name, plane in zip(field.columns, planes, strict=True):
            columns[name] = lists(plane, given.lengths_B) if isinstance(given, RaggedValues) else fixed_lists(plane)
    return columns


def read_values(fields: tuple[Field, ...], columns: Columns) -> dict[str, npt.NDArray[Any]]:
    """Read the values of each field: [B, width], or the concatenated values of all sequences.

    Raises:
        KeyError: A column is missing.
        ValueError: A column has another type, the planes of a field differ in size, or there are unknown columns.
    """
    values = {}
    for field in fields:
        if field.width:
            planes = [columns.fixed(name, field.width, field.kind) for name in field.columns]
        else:
            planes = [columns.ragged(name, field.kind) for name in field.columns]
        values[field.name] = planes[0] if field.planes is None else join_planes(planes)
    columns.require_all_read()
    return values
