"""The models of everything that capgap writes down: run files, manifests, records of shards, results and errors.

    run file (YAML)  --run_file-->  RunFile  --stages-->  Manifest (manifest.json of every finished stage)
                                                             |
    Sequences, SampledTargets, TopkTargets (records)  <------+  shard list, facts, digests

This package imports no other part of capgap; everything else may import it.
"""

from capgap.schemas.errors import (
    CapgapError,
    CorruptError,
    InputError,
    MachineError,
    MismatchError,
    SettingError,
)
from capgap.schemas.run_file import RunFile

__all__ = [
    "CapgapError",
    "CorruptError",
    "InputError",
    "MachineError",
    "MismatchError",
    "RunFile",
    "SettingError",
]
