"""Micro-batches on disk: one safetensors file each, and a JSON file that describes them.

micro-batch-00000123.safetensors ...   tensors by the names of `Batch`'s attributes
not-finite.json                        what was found there, by which settings, of which sequences
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
    """A micro-batch that is kept.

    Attributes:
        number: over the whole training.
        batch: itself.
        sequences: shard, member and row of each.
        at_fault: those of them in which something is wrong, or all where that cannot be known.
    """

    number: int
    batch: Batch
    sequences: list[str]
    at_fault: list[str]


def keep_batches(folder: Path, kept: Sequence[KeptBatch], setting: dict[str, Any]) -> None:
    """Write them, in place of what an earlier training kept there; `setting` is of JSON values."""
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
    """What `keep_batches` wrote: the micro-batches, and the settings.

    Raises:
        InputError: the folder holds none.
    """
    try:
        setting = json.loads((folder / _NAME).read_bytes())
    except FileNotFoundError:
        raise InputError(
            "holds no kept batch",
            where=folder,
            found=f"no {_NAME}",
            expected="what a training keeps where a loss is not finite",
            fix="name the folder that its error names",
        ) from None
    entries = setting.pop("micro_batches")
    kept = [
        KeptBatch(e["number"], Batch(**load_file(folder / e["file"])), e["sequences"], e["at_fault"]) for e in entries
    ]
    return kept, setting
