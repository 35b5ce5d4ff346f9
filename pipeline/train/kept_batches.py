"""Stores micro-batches whose loss or gradient is not finite, and loads them again.

micro-batch-00000123.safetensors ...   the tensors of a micro-batch, by the names of `Batch`'s attributes
not-finite.json                        the value that was found, the settings, and the sequences
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from capgap.pipeline.store import Batch
from capgap.pipeline.store.files import write_atomically
from capgap.schemas.errors import InputError

_NAME = "not-finite.json"


@dataclass(frozen=True)
class KeptBatch:
    """A micro-batch that is stored for a replay.

    Attributes:
        number: Number of the micro-batch, counted over the whole training.
        batch: The micro-batch.
        sequences: Shard, member and row of each of its sequences.
        at_fault: The entries of `sequences` with a value that is not finite, or all of them if these are not known.
    """

    number: int
    batch: Batch
    sequences: list[str]
    at_fault: list[str]


def keep_batches(folder: Path, kept: Sequence[KeptBatch], setting: dict[str, Any]) -> None:
    """Write micro-batches into a folder, and delete those that an earlier training stored there.

    Args:
        folder: The folder, which is made if it does not exist.
        kept: The micro-batches.
        setting: JSON values that a replay needs, stored in not-finite.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("micro-batch-*.safetensors"):
        old.unlink()
    micro_batches = []
    for one in kept:
        name = f"micro-batch-{one.number:08d}.safetensors"
        tensors = {key: value.cpu().contiguous() for key, value in one.batch.tensors().items() if value is not None}
        save_file(tensors, folder / name)
        entry = {"number": one.number, "file": name, "sequences": one.sequences, "at_fault": one.at_fault}
        micro_batches.append(entry)
    write_atomically(folder / _NAME, json.dumps(setting | {"micro_batches": micro_batches}, indent=1))


def load_batches(folder: Path) -> tuple[list[KeptBatch], dict[str, Any]]:
    """Load the micro-batches and the settings that `keep_batches` wrote.

    Raises:
        InputError: The folder holds no such files.
    """
    try:
        setting = json.loads((folder / _NAME).read_bytes())
    except FileNotFoundError:
        raise InputError(
            "holds no kept batch",
            where=folder,
            found=f"no {_NAME}",
            expected="the files that a training keeps when a loss is not finite",
            fix="use the folder that the training's error names",
        ) from None
    entries = setting.pop("micro_batches")
    kept = [
        KeptBatch(e["number"], Batch(**load_file(folder / e["file"])), e["sequences"], e["at_fault"]) for e in entries
    ]
    return kept, setting
