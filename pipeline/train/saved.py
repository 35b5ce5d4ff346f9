"""A checkpoint on disk: one file, or a folder with a file of each rank where ranks hold parts of the parameters.

Both hold the same names, so that either is read under any strategy and by any number of ranks. A file is torch's zip
archive, read as tensors and plain values only, never as code; its checksums reveal damage.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from capgap.pipeline.store.files import sync_folder

_PART = "part of dimension 0"
_NUM_PARTS = "num_parts"
_CONTENT = "checkpoint"


class Pieces:
    """A tensor of which each rank has written a part; put together when it is asked for."""

    def __init__(self, parts: list[torch.Tensor]) -> None:
        self._parts = parts

    def whole(self) -> torch.Tensor:
        """All of it."""
        return torch.cat(self._parts)


def whole(value: Any) -> Any:
    """The tensor that pieces make; any other value as it is."""
    return value.whole() if isinstance(value, Pieces) else value


def write_part(checkpoint: dict[str, Any], path: Path, num_parts: int = 1) -> None:
    """Write a rank's checkpoint, its own part of each divided tensor, and wait until the disk has it."""
    content = tree_map(_local, checkpoint)
    with path.open("wb") as file:
        try:
            torch.save({_NUM_PARTS: num_parts, _CONTENT: content}, file)
        except RuntimeError as error:
            # what torch makes of a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What was written; divided tensors as `Pieces`. Nothing is read from the disk that is not asked for."""
    parts = [torch.load(file, map_location="cpu", mmap=True, weights_only=True)[_CONTENT] for file in _files(path)]
    content: dict[str, Any] = _joined(parts)
    return content


def fault_of(path: Path) -> str:
    """What is wrong with a checkpoint, in words; empty where it is sound. Reads all of it."""
    try:
        for file in _files(path):
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                return f"{file.name}: checksum mismatch"
        expected = torch.load(_files(path)[0], map_location="cpu", mmap=True, weights_only=True)[_NUM_PARTS]
    except (
        Exception
    ) as error:  # whatever the bytes say, reading them as tensors and plain values does no more than fail
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return "" if expected == len(_files(path)) else f"{len(_files(path))} of {expected} files"


class CheckpointFiles(CheckpointIO):
    """Lightning's checkpoints of whole models, in these files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one file."""
        write_part(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read it, or put together what ranks have written."""
        content: dict[str, Any] = tree_map(whole, read_checkpoint(Path(path)))
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Delete it."""
        Path(path).unlink()


def publish(temporary: Path, path: Path) -> None:
    """Give a finished checkpoint its name; whoever finds that name finds all of it, even after a power failure."""
    if temporary.is_dir():
        sync_folder(temporary)
    temporary.replace(path)
    sync_folder(path.parent)
    # the folder itself may be as new as its first checkpoint
    sync_folder(path.parent.parent)


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _local(value: Any) -> Any:
    return {_PART: value.to_local().detach()} if isinstance(value, DTensor) else value


def _joined(parts: list[Any]) -> Any:
    """The same structure in one: divided tensors as pieces, everything else as the first rank has it."""
    first = parts[0]
    if isinstance(first, dict):
        if _PART in first:
            return Pieces([part[_PART] for part in parts])
        return {name: _joined([part[name] for part in parts]) for name in first}
    if isinstance(first, list | tuple):
        return type(first)(_joined(list(items)) for items in zip(*parts, strict=True))
    return first
