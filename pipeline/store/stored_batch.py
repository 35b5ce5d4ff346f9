"""The stored columns of a micro-batch's sequences in one buffer, so that one copy takes them to the device.

Legend: B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from capgap.pipeline.store.planes import unpack_bits
from capgap.pipeline.store.stored import StoredBlock
from capgap.schemas.run_corpus import ContextRule

# the start of each column in the buffer is a multiple of this, which suits every dtype
_ALIGNED_BYTES = 16
# the column of document starts, which is left out under the context rule `packed`
_STARTS = "starts"

_KINDS = {np.dtype(np.uint8): torch.uint8, np.dtype(np.uint16): torch.uint16, np.dtype(np.int32): torch.int32}


@dataclass(frozen=True)
class _Part:
    start: int
    kind: torch.dtype
    shape: tuple[int, ...]


class StoredBatch:
    """The stored columns of B sequences.

    Attributes:
        num_sequences: B.
        widest: Number of ids of the widest target.
        num_counted: Number of labels that the loss counts.
    """

    def __init__(
        self, buffer: torch.Tensor, parts: dict[str, _Part], num_sequences: int, widest: int, num_counted: int
    ) -> None:
        self._buffer, self._parts = buffer, parts
        self.num_sequences, self.widest, self.num_counted = num_sequences, widest, num_counted

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a column: [B, width], the values of a ragged column, or, as `offsets NAME`, its offsets [B + 1]."""
        part = self._parts[name]
        size = part.kind.itemsize * int(np.prod(part.shape))
        return self._buffer[part.start : part.start + size].view(part.kind).view(part.shape)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    @property
    def device(self) -> torch.device:
        """Return the device that holds the buffer."""
        return self._buffer.device

    def to(self, device: torch.device | str) -> StoredBatch:
        """Return the columns on another device, transferred in one copy."""
        buffer = self._buffer.to(device, non_blocking=True)
        return StoredBatch(buffer, self._parts, self.num_sequences, self.widest, self.num_counted)


def gather(
    samples: list[tuple[StoredBlock, int]], seq_len: int, pin: bool, context: ContextRule = "packed"
) -> StoredBatch:
    """Gather the columns of sequences in one buffer.

    Args:
        samples: The sequences, each as its block and its index in the block.
        seq_len: L, the number of targets in a sequence.
        pin: Whether the buffer is in page-locked memory.
        context: Context rule. The column of document starts is included under `document` only.
    """
    first = samples[0][0]
    arrays: dict[str, list[npt.NDArray[Any]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in first.fixed:
        if name != _STARTS or context == "document":
            arrays[name] = [block.fixed[name][row] for block, row in samples]
            shapes[name] = (len(samples), first.fixed[name].shape[1])
    for name in first.ragged:
        borders = [block.offsets[name][row : row + 2] for block, row in samples]
        arrays[name] = [
            block.ragged[name][start:stop] for (block, _), (start, stop) in zip(samples, borders, strict=True)
        ]
        ends = np.cumsum([0, *(stop - start for start, stop in borders)]).astype(np.int32)
        shapes[name] = (int(ends[-1]),)
        arrays[f"offsets {name}"], shapes[f"offsets {name}"] = [ends], ends.shape
    parts, size = {}, 0
    for name, shape in shapes.items():
        parts[name] = _Part(size, _KINDS[arrays[name][0].dtype], shape)
        num_bytes = parts[name].kind.itemsize * int(np.prod(shape))
        size += -(-num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
    batch = StoredBatch(
        torch.empty(size, dtype=torch.uint8, pin_memory=pin),
        parts,
        len(samples),
        max((int(block.widest_B[row]) for block, row in samples if len(block.widest_B)), default=0),
        # the first token of a sequence is never a label
        sum(int(unpack_bits(block.fixed["mask"][row : row + 1], seq_len + 1)[0, 1:].sum()) for block, row in samples),
    )
    for name, parts_of_name in arrays.items():
        np.concatenate(parts_of_name, out=batch[name].numpy().reshape(-1))
    return batch
