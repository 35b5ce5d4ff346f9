"""The random offset of each row, as a pure function of seed, sequence and position.

Philox is a block cipher that encrypts a counter, so block c of a key is computed without the blocks before it. The key
is a hash of seed and sequence, and the counter is the position. So neither batching nor a retry changes an offset.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_WORDS = 4  # 64-bit words in a block of Philox
_MANTISSA_BITS = 24  # float32 represents every such offset exactly, and the largest is below 1


def offsets(seed: int, digest: bytes, start: int, num_rows: int) -> npt.NDArray[np.float32]:
    """Return uniform offsets in [0, 1) for `num_rows` positions of a sequence from `start` on, float32 [num_rows].

    Args:
        seed: Seed of the recording.
        digest: Identity of the sequence, of any length.
        start: Position of the first row in the sequence.
        num_rows: Number of rows.

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
