"""Turns one shard of a cache into the student's tokens: packed sequences of the same text, and its chunks.

    TeacherStream --bytes--> documents --encode--> student's stream --cut--> chunks --pack--> Sequences, ChunkTargets

Documents begin and end with the student's own tokens. The last sequence is filled with end tokens that are no labels,
so that no text is lost.

Legend: T teacher's tokens, U student's tokens, D documents, C chunks, B sequences, L targets per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from capgap.pipeline.align.chunking import Chunks, Doubles, border_probabilities, cut
from capgap.pipeline.align.projection import BothTokens, Singles, project
from capgap.pipeline.align.stream import TeacherStream
from capgap.pipeline.align.token_bytes import Ints, TextTokenizer
from capgap.pipeline.corpus.pack import cut_rows
from capgap.schemas.base import Record
from capgap.schemas.errors import InputError
from capgap.schemas.records import ChunkTargets, Sequences

Flags = npt.NDArray[np.bool_]

# a character of UTF-8 has at most three bytes behind its first byte
_FURTHER = 3


@dataclass(frozen=True)
class StudentFormat:
    """How the student's sequences are made.

    Attributes:
        tokenizer: the student's tokenizer.
        eos_id: the token that ends a document.
        bos_ids: the ids with which a document begins, and also its rest in the next sequence.
        seq_len: number of targets per sequence.
        min_border_probability: a border that is trusted less makes the chunk before and the chunk behind it unreliable.
    """

    tokenizer: TextTokenizer
    eos_id: int
    bos_ids: tuple[int, ...]
    seq_len: int
    min_border_probability: float


class ShardCounts(Record):
    """Counts of what a shard holds."""

    num_documents: int
    """Number of documents that begin in the shard."""

    num_text_bytes: int
    """Bytes of text."""

    num_text_tokens: int
    """Number of the student's tokens of the text, including ends of documents."""

    num_chunks: int
    """Number of chunks of the text."""

    num_kept_chunks: int
    """Number of chunks that a student learns from."""

    num_unreliable_chunks: int
    """Number of chunks beside an unreliable border. Other chunks are not kept if the teacher's logprob is not known, or
    if a sequence ends within the chunk."""

    num_projected: int
    """Number of targets with a projected distribution."""

    projected_mass: float
    """Sum over these targets of the projected probabilities without the tail."""

    known_nats: float
    """Minus the sum of the teacher's logprobs of the kept chunks, in nats."""

    known_bytes: int
    """Bytes of text in the kept chunks; an end of a document counts as none."""


def align_shard(
    stream: TeacherStream, teacher: TextTokenizer, student: StudentFormat, both: BothTokens | None = None
) -> tuple[Sequences, ChunkTargets, ShardCounts]:
    """Encode the text of a shard with the student's tokenizer; return its sequences, their chunks, and counts.

    Args:
        stream: the teacher's tokens of the shard.
        teacher: the teacher's tokenizer.
        student: how the student's sequences are made.
        both: the comparison of the two vocabularies, if the stream's top-k tokens are to be projected.

    Raises:
        InputError: a document's tokens are no valid UTF-8, or the student's tokenizer changes the text.
    """
    assert len(stream.ids_T), "a shard holds tokens"
    text = _Text.read(stream, teacher)
    ids_U, first_D, lengths_U = _encode(text, student)
    ends_T, ends_U = np.cumsum(text.lengths_T), np.cumsum(lengths_U)
    chunks = cut(ends_T, ends_U)
    borders_C = border_probabilities(
        chunks, ends_T, text.lengths_T, ends_U, lengths_U, stream.logprobs_T, stream.longer
    )
    # a border whose probability is not known (NaN) is not below any bound
    is_weak_C = borders_C < student.min_border_probability
    unreliable_C = is_weak_C.copy()
    unreliable_C[1:] |= is_weak_C[:-1]
    unknown_T = np.isnan(stream.logprobs_T) | ~stream.counts_T | text.is_cut_T
    summed_C = np.bincount(chunks.of_T, np.where(unknown_T, 0.0, stream.logprobs_T), chunks.count)
    logprobs_C: Doubles = summed_C.astype(np.float64)
    known_C = np.bincount(chunks.of_T, unknown_T, chunks.count) == 0
    not_counted_C = np.bincount(chunks.of_T, ~stream.counts_T, chunks.count) > 0
    packed = _pack(ids_U, first_D, stream.is_begun, ~not_counted_C[chunks.of_U], student)
    sequences, place_BL1 = packed
    kept_C = known_C & ~unreliable_C & _whole(chunks, place_BL1, sequences.mask_BL1)
    targets = _targets(chunks, place_BL1, kept_C, logprobs_C)
    mass = 0.0
    if both is not None and stream.top is not None:
        is_first_T = np.zeros(len(stream.ids_T), np.bool_)
        # a tokenizer that puts a blank before a document predicts other first tokens than the text itself has
        is_first_T[stream.first_D] = teacher.puts_blank or student.tokenizer.puts_blank
        single = Singles.of(chunks, kept_C, stream.ids_T, ids_U, ~is_first_T, both, student.min_border_probability)
        projected, mass = project(stream.top, single, place_BL1[:, 1:], both, student.min_border_probability)
        targets = replace(targets, projected=projected)
    bytes_C = np.bincount(chunks.of_T, np.where(stream.is_end_T, 0, text.lengths_T), chunks.count)
    counts = ShardCounts(
        num_documents=len(stream.first_D) - stream.is_begun,
        num_text_bytes=int(ends_T[-1] - stream.is_end_T.sum()),
        num_text_tokens=len(ids_U),
        num_chunks=chunks.count,
        num_kept_chunks=int(kept_C.sum()),
        num_unreliable_chunks=int(unreliable_C.sum()),
        num_projected=0 if targets.projected is None else int((targets.projected.num_ids_BL > 0).sum()),
        projected_mass=mass,
        known_nats=-float(logprobs_C[kept_C].sum()),
        known_bytes=int(bytes_C[kept_C].sum()),
    )
    return sequences, targets, counts


@dataclass(frozen=True)
class _Text:
    """The text that the teacher's tokens spell.

    Attributes:
        documents: the documents as text.
        has_end_D: whether the end of each document is in the shard.
        lengths_T: bytes of each token; 1 for the end of a document.
        is_cut_T: whether the shard's edge separates each token from some of its bytes, or from the token behind it.
    """

    documents: list[str]
    has_end_D: Flags
    lengths_T: Ints
    is_cut_T: Flags

    @classmethod
    def read(cls, stream: TeacherStream, teacher: TextTokenizer) -> _Text:
        table, is_end_T = teacher.table, stream.is_end_T
        lengths_T = np.where(is_end_T, 0, table.length_V[stream.ids_T])
        skip_T = np.zeros_like(lengths_T)
        if teacher.puts_blank:
            begun_D = stream.first_D[1:] if stream.is_begun else stream.first_D
            blank_D = [table.bytes_of(int(one)).startswith(b" ") for one in stream.ids_T[begun_D]]
            skip_T[begun_D[np.array(blank_D, np.bool_)]] = 1
        is_text_T = ~is_end_T
        data = table.join(stream.ids_T[is_text_T], skip_T[is_text_T]).tobytes()
        lengths_T = lengths_T - skip_T
        stops_D = np.append(stream.first_D[1:], len(is_end_T))
        bytes_D = np.append(0, np.cumsum(lengths_T))[stops_D]
        parts = [data[start:stop] for start, stop in pairwise((0, *map(int, bytes_D)))]
        lead = _lead(parts[0]) if stream.is_begun else 0
        tail = 0 if is_end_T[-1] else _tail(parts[-1])
        parts[0] = parts[0][lead:]
        parts[-1] = parts[-1][: len(parts[-1]) - tail]
        is_cut_T = np.zeros(len(lengths_T), np.bool_)
        _take(lengths_T, is_cut_T, lead, range(len(lengths_T)))
        _take(lengths_T, is_cut_T, tail, range(len(lengths_T) - 1, -1, -1))
        lengths_T[is_end_T] = 1
        # a blank at the end of the shard belongs to a document in the next shard, and to no chunk here
        is_cut_T[-1] |= lengths_T[-1] == 0
        return cls([_decoded(part, teacher) for part in parts], is_end_T[stops_D - 1], lengths_T, is_cut_T)


def _lead(data: bytes) -> int:
    """Return the number of leading bytes that belong to a character which begins before the data."""
    count = 0
    while count < min(_FURTHER, len(data)) and data[count] & 0xC0 == 0x80:
        count += 1
    return count


def _tail(data: bytes) -> int:
    """Return the number of trailing bytes that begin a character without completing it."""
    for count in range(1, min(_FURTHER, len(data)) + 1):
        byte = data[-count]
        if byte & 0xC0 != 0x80:
            size = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
            return count if size > count else 0
    return 0


def _take(lengths_T: Ints, is_cut_T: Flags, count: int, order: range) -> None:
    """Remove `count` bytes from the tokens in the given order, and mark these tokens as cut."""
    for place in order:
        if not count:
            return
        taken = min(count, int(lengths_T[place]))
        lengths_T[place] -= taken
        is_cut_T[place] = True
        count -= taken


def _decoded(data: bytes, teacher: TextTokenizer) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            "a document of the cache does not decode to itself",
            where=teacher.where,
            found=f"bytes that are no UTF-8: {data[max(0, error.start - 20) : error.end + 20]!r}",
            expected="text",
            fix="align a cache of whole documents that this version of capgap made from texts",
        ) from None


def _encode(text: _Text, student: StudentFormat) -> tuple[Ints, Ints, Ints]:
    """Return the student's tokens, the first token of each document, and the bytes of each token; 1 for an end."""
    tokenizer = student.tokenizer
    ids: list[Ints] = []
    skips: list[Ints] = []
    is_end: list[Flags] = []
    firsts, total = [], 0
    for one, document, has_end in zip(tokenizer.encode(text.documents), text.documents, text.has_end_D, strict=True):
        found = np.array([*one, student.eos_id] if has_end else one, np.int64)
        end = np.zeros(len(found), np.bool_)
        end[len(one) :] = True
        skip = np.zeros(len(found), np.int64)
        num_bytes = int(np.maximum(tokenizer.table.length_V[found[: len(one)]], 0).sum())
        if len(one) and tokenizer.puts_blank and num_bytes == len(document.encode()) + 1:
            skip[0] = 1
        spelt = tokenizer.table.join(found[: len(one)], skip[: len(one)]).tobytes()
        if spelt != document.encode():
            tokenizer.require_bytes(one, document)
        firsts.append(total)
        total += len(found)
        ids.append(found)
        skips.append(skip)
        is_end.append(end)
    ids_U, skip_U, is_end_U = np.concatenate(ids), np.concatenate(skips), np.concatenate(is_end)
    lengths_U = np.where(is_end_U, 1, tokenizer.table.length_V[ids_U] - skip_U)
    return ids_U, np.array(firsts, np.int64), lengths_U


def _pack(
    ids_U: Ints, first_D: Ints, is_begun: bool, counts_U: Flags, student: StudentFormat
) -> tuple[Sequences, Ints]:
    """Return the sequences, and the place in U of each of their tokens [B, L + 1]; -1 for BOS and for padding."""
    begin, size = np.array(student.bos_ids, np.int64), student.seq_len + 1
    # the stream W is the U tokens with BOS ids before each document, and the padding of the last sequence behind it
    begins = first_D[1:] if is_begun else first_D
    place_W = np.insert(np.arange(len(ids_U)), np.repeat(begins, len(begin)), -1)
    begun_D = begins + len(begin) * np.arange(len(begins))
    ids_W = np.empty(len(place_W) + size, np.int64)
    ids_W[: len(place_W)] = ids_U[place_W]
    ids_W[: len(place_W)][place_W < 0] = np.tile(begin, len(begins))
    ids_W[len(place_W) :] = student.eos_id
    starts_W = np.zeros(len(ids_W), np.bool_)
    starts_W[begun_D] = True
    place_W = np.append(place_W, np.full(size, -1))
    counts_W = np.where(place_W >= 0, counts_U[place_W], False)
    num_real = len(ids_W) - size
    # a document that began in an earlier shard continues here, so it begins before this stream
    begins_D = np.concatenate([[-size] if is_begun else [], begun_D, [len(ids_W)]]).astype(np.int64)
    has_bos_D = np.full(len(begins_D) - 1, bool(len(begin)))
    rows = [row for row in cut_rows(begins_D, has_bos_D, size, len(begin)) if row[0] < num_real]
    made = Sequences(
        np.empty((len(rows), size), np.int32),
        np.zeros((len(rows), size), np.bool_),
        np.zeros((len(rows), size), np.bool_),
    )
    place_BL1 = np.full((len(rows), size), -1, np.int64)
    for number, (first, num_put, is_rest) in enumerate(rows):
        part = slice(first, first + size - num_put)
        made.tokens_BL1[number, :num_put] = begin[:num_put]
        made.tokens_BL1[number, num_put:] = ids_W[part]
        made.starts_BL1[number, num_put:], made.mask_BL1[number, num_put:] = starts_W[part], counts_W[part]
        place_BL1[number, num_put:] = place_W[part]
        made.mask_BL1[number, num_put] &= not is_rest
    return made, place_BL1


def _whole(chunks: Chunks, place_BL1: Ints, mask_BL1: Flags) -> Flags:
    """Return which chunks have all their tokens among the labels of one sequence [C]."""
    row_U, is_label_U = np.full(len(chunks.of_U), -1, np.int64), np.zeros(len(chunks.of_U), np.bool_)
    row_N, column_N = np.nonzero(place_BL1 >= 0)
    place_N = place_BL1[row_N, column_N]
    row_U[place_N], is_label_U[place_N] = row_N, mask_BL1[row_N, column_N] & (column_N > 0)
    first_C = np.flatnonzero(np.diff(chunks.of_U, prepend=-1))
    last_C = np.append(first_C[1:], len(chunks.of_U)) - 1
    whole_C: Flags = np.bincount(chunks.of_U, ~is_label_U, chunks.count) == 0
    whole_C &= row_U[first_C] == row_U[last_C]
    return whole_C


def _targets(chunks: Chunks, place_BL1: Ints, kept_C: Flags, logprobs_C: Doubles) -> ChunkTargets:
    """Put each chunk at the target of its last token; each token that is no text ends a chunk of its own."""
    last_U = np.diff(chunks.of_U, append=chunks.count) > 0
    place_BL = place_BL1[:, 1:]
    is_text_BL, chunk_BL = place_BL >= 0, chunks.of_U[place_BL]
    ends_BL = ~is_text_BL | last_U[place_BL]
    kept_BL = is_text_BL & ends_BL & kept_C[chunk_BL]
    logprobs_BL = np.where(kept_BL, logprobs_C[chunk_BL], 0.0).astype(np.float32)
    # rounding alone may have put a sum above 0
    return ChunkTargets(ends_BL, kept_BL, np.minimum(logprobs_BL, 0))
