"""Keep the teacher's full logprobs of a few sequences on disk while the students are measured one after another.

Legend: N rows (labelled positions), V real vocabulary.

The file has no name, so the operating system frees it when the process ends, even if it is killed. It is on the disk of
the stage's folder and not in the system's temporary folder, which is in memory on many machines.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch

from capgap.schemas.amounts import bytes_text
from capgap.schemas.errors import MachineError

_ITEM_BYTES = 4


@contextmanager
def open_spool(folder: Path, num_rows: int, vocab_size: int) -> Iterator[Spool]:
    """Open a file for N x V float32 logprobs on the disk of `folder`, and close it at the end of the context.

    Raises:
        MachineError: The disk has too little room.
    """
    num_bytes = num_rows * vocab_size * _ITEM_BYTES
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise _too_little_room(folder, num_bytes, free)
    with tempfile.TemporaryFile(dir=folder) as file:
        yield Spool(file, folder, num_rows, vocab_size)


class Spool:
    """Rows are appended in order, then read any number of times."""

    def __init__(self, file: IO[bytes], folder: Path, num_rows: int, vocab_size: int) -> None:
        self._file, self._folder, self._shape = file, folder, (num_rows, vocab_size)

    def append(self, logprobs_NV: torch.Tensor) -> None:
        """Append rows of logprobs, float32 on any device [n, V].

        Raises:
            MachineError: The disk is full.
        """
        try:
            self._file.write(logprobs_NV.contiguous().cpu().numpy().data)
        except OSError as error:
            num_rows, vocab_size = self._shape
            free = shutil.disk_usage(self._folder).free
            raise _too_little_room(self._folder, num_rows * vocab_size * _ITEM_BYTES, free) from error

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the rows `start` to `stop` on the CPU, float32 [stop - start, V]."""
        self._file.flush()
        mapped_NV = np.memmap(self._file, np.float32, "r", shape=self._shape)
        return torch.from_numpy(np.array(mapped_NV[start:stop]))


def _too_little_room(folder: Path, num_bytes: int, free: int) -> MachineError:
    return MachineError(
        "too little disk space for the teacher's full distributions",
        where=folder,
        found=bytes_text(free),
        expected=bytes_text(num_bytes),
        fix="lower eval.num_full_sequences or free some space",
    )
