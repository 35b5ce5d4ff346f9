"""The one random number of a row, as a pure function of where the row stands.

Philox is a block cipher run over a counter: block c of a key is computed without the blocks before it. The key is a
hash of seed and sequence, the counter is the position, so neither batching nor a retry changes an offset.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_WORDS = 4  # of 64 bits in a block of Philox
_MANTISSA_BITS = 24  # of float32: every value below is exact, and the largest is still below 1


def offsets(seed: int, digest: bytes, start: int, num_rows: int) -> npt.NDArray[np.float32]:
    """Offsets in [0, 1) of positions `start` to `start + num_rows` of a sequence, uniform, float32 [num_rows].

    Args:
        seed: seed of the recording.
        digest: identity of the sequence, any length.
        start: absolute position of the first row.
        num_rows: rows wanted.

    Raises:
        ValueError: `start` or `num_rows` is negative.
    """
    if start < 0 or num_rows < 0:
        raise ValueError(f"start, num_rows: got {start}, {num_rows}, expected numbers of at least 0")
    key = hashlib.blake2b(b"%d:%b" % (seed, digest), digest_size=16).digest()
    block, skip = divmod(start, _WORDS)
    words = np.random.Philox(key=int.from_bytes(key, "little"), counter=block).random_raw(skip + num_rows)[skip:]
    mantissas = words >> np.uint64(64 - _MANTISSA_BITS)
    return mantissas.astype(np.float32) * np.float32(2.0**-_MANTISSA_BITS)
