"""Numbers as byte planes, bits and quads: layouts in which zstd finds repetitions.

A plane holds one byte of every number; plane 0 holds the lowest. High planes are nearly constant and compress to almost
nothing, and they do not interrupt the sequence of the low bytes.

Legend: D numbers in a row, Q = ceil(D / 4) quads, B rows of W bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

ESCAPE = 3
# for each quad, its four numbers as the bytes of one little-endian 32-bit word
QUADS = np.array([sum((quad >> 2 * i & 3) << 8 * i for i in range(4)) for quad in range(256)], dtype="<u4")


def num_planes(largest: int) -> int:
    """Return how many bytes a number of at most `largest` needs."""
    return max(1, (largest.bit_length() + 7) // 8)


def split_planes(values: npt.NDArray[Any], planes: int) -> list[Bytes]:
    """Split numbers into byte planes, each of the shape of `values`, the lowest byte first."""
    size = values.dtype.itemsize
    if size < planes:
        values, size = values.astype(np.uint32), 4
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    raw = little.view(np.uint8).reshape(*values.shape, size)
    return [np.ascontiguousarray(raw[..., plane]) for plane in range(planes)]


def join_planes(planes: list[Bytes]) -> npt.NDArray[Any]:
    """Join byte planes to numbers, in the narrowest unsigned type of 1, 2 or 4 bytes.

    Raises:
        ValueError: The planes differ in size.
    """
    if len({plane.shape for plane in planes}) != 1:
        raise ValueError(f"planes of {', '.join(str(plane.size) for plane in planes)} bytes")
    if len(planes) == 1:
        return planes[0]
    kind = "<u2" if len(planes) == 2 else "<u4"
    raw = np.zeros((*planes[0].shape, int(kind[-1])), np.uint8)
    for number, plane in enumerate(planes):
        raw[..., number] = plane
    return raw.view(kind)[..., 0]


def pack_bits(flags_BW: npt.NDArray[np.bool_]) -> Bytes:
    """Pack flags [B, W] into bytes [B, ceil(W / 8)]; the first flag is the lowest bit."""
    return np.packbits(flags_BW, axis=1, bitorder="little")


def unpack_bits(packed: Bytes, width: int) -> npt.NDArray[np.bool_]:
    """Unpack bytes from `pack_bits` into flags [B, width]."""
    return np.unpackbits(packed, axis=1, count=width, bitorder="little").astype(np.bool_)


def pack_quads(values_D: Bytes) -> tuple[Bytes, Bytes]:
    """Pack numbers into quads of two bits a number [Q]; 3 means 3 or more, and its excess over 3 is an escape.

    Returns:
        The quads, and the escapes in the order of their numbers.
    """
    padded = np.zeros(-(-len(values_D) // 4) * 4, np.uint8)
    low_D = np.minimum(values_D, ESCAPE, out=padded[: len(values_D)])
    escapes = values_D[low_D == ESCAPE] - np.uint8(ESCAPE)
    word_Q = padded.view("<u4")
    # the two low bits of each byte of a word are gathered in the word's lowest byte
    word_Q |= word_Q >> 6
    word_Q |= word_Q >> 12
    return word_Q.astype(np.uint8), escapes


def unpack_quads(quads_Q: Bytes, more: Bytes, size: int) -> Bytes:
    """Unpack `size` numbers from quads and escapes; the inverse of `pack_quads`.

    Raises:
        ValueError: The number of quads or escapes is wrong.
    """
    if len(quads_Q) != -(-size // 4):
        raise ValueError(f"{len(quads_Q)} quads for {size} numbers")
    values_D: Bytes = np.take(QUADS, quads_Q).view(np.uint8)[:size]
    escaped = np.flatnonzero(values_D == ESCAPE)
    if len(escaped) != len(more):
        raise ValueError(f"{len(more)} escapes, expected {len(escaped)}")
    values_D[escaped] += more
    return values_D


def sums_before(sizes_N: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return where each of N consecutive runs of these sizes begins [N]."""
    ends_N = np.cumsum(sizes_N, dtype=np.int64)
    first_N: npt.NDArray[np.int64] = ends_N - sizes_N
    return first_N


def cumulate_runs(deltas_D: npt.NDArray[Any], sizes_N: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Return cumulative sums [D], uint32, that restart in each of N consecutive runs.

    Intermediate sums may wrap around 2^32; the differences of wrapped sums are still correct.
    """
    ends_D = np.cumsum(deltas_D, dtype=np.uint32)
    first_N = sums_before(sizes_N)
    before_N = np.concatenate([np.zeros(1, np.uint32), ends_D])[first_N]
    ends_D -= np.repeat(before_N, sizes_N)
    return ends_D
