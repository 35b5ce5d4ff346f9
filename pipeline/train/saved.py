"""A checkpoint on disk: one file, or a folder with one file of each rank if ranks hold parts of the parameters.

Both forms use the same names, so that either can be read under any strategy and by any number of ranks. A file is a zip
archive of torch.save. It is read as tensors and plain values only, never as code, and its checksums reveal damage.
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
    """A tensor of which each rank has written a part; `whole` joins the parts."""

    def __init__(self, parts: list[torch.Tensor]) -> None:
        self._parts = parts

    def whole(self) -> torch.Tensor:
        """Return the whole tensor, joined along dimension 0."""
        return torch.cat(self._parts)


def whole(value: Any) -> Any:
    """Return the whole tensor if the value is `Pieces`, and any other value unchanged."""
    return value.whole() if isinstance(value, Pieces) else value


def write_part(checkpoint: dict[str, Any], path: Path, num_parts: int = 1) -> None:
    """Write a rank's checkpoint, with its own part of each divided tensor, and wait until it is on the disk.

    Args:
        checkpoint: The checkpoint, as Lightning makes it.
        path: The file.
        num_parts: Number of files that make up the checkpoint.

    Raises:
        OSError: The disk is full, or the file cannot be written.
    """
    content = tree_map(_local, checkpoint)
    with path.open("wb") as file:
        try:
            torch.save({_NUM_PARTS: num_parts, _CONTENT: content}, file)
        except RuntimeError as error:
            # Torch wraps the error of a full disk.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, with divided tensors as `Pieces`. A tensor's data is read from the disk when it is used."""
    parts = [torch.load(file, map_location="cpu", mmap=True, weights_only=True)[_CONTENT] for file in _files(path)]
    content: dict[str, Any] = _joined(parts)
    return content


def fault_of(path: Path) -> str:
    """Read all of a checkpoint and return a description of its damage, or an empty string if it is sound."""
    try:
        for file in _files(path):
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                return f"{file.name}: checksum mismatch"
        expected = torch.load(_files(path)[0], map_location="cpu", mmap=True, weights_only=True)[_NUM_PARTS]
    except (
        Exception
    ) as error:  # damaged bytes may raise any exception, and nothing else can happen, as no code is read from them
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return "" if expected == len(_files(path)) else f"{len(_files(path))} of {expected} files"


class CheckpointFiles(CheckpointIO):
    """Lets Lightning write and read the checkpoints of undivided models in this format."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint as one file."""
        write_part(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint of either form, with whole tensors."""
        content: dict[str, Any] = tree_map(whole, read_checkpoint(Path(path)))
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Delete the file of a checkpoint."""
        Path(path).unlink()


def publish(temporary: Path, path: Path) -> None:
    """Give a finished checkpoint its final name, under which it is complete even after a power failure."""
    if temporary.is_dir():
        sync_folder(temporary)
    temporary.replace(path)
    sync_folder(path.parent)
    # The folder may be new as well, so its own entry is synchronized too.
    sync_folder(path.parent.parent)


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _local(value: Any) -> Any:
    return {_PART: value.to_local().detach()} if isinstance(value, DTensor) else value


def _joined(parts: list[Any]) -> Any:
    """Join the ranks' checkpoints into one: divided tensors become `Pieces`, any other value is rank 0's."""
    first = parts[0]
    if isinstance(first, dict):
        if _PART in first:
            return Pieces([part[_PART] for part in parts])
        return {name: _joined([part[name] for part in parts]) for name in first}
    if isinstance(first, list | tuple):
        return type(first)(_joined(list(items)) for items in zip(*parts, strict=True))
    return first
