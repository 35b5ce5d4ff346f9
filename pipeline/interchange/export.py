"""Export: a finished cache as Parquet, one file a shard, for `datasets` and other programs that read lists.

    cache (folder or URL) --member by member--> RECORDING/train-000000.parquet ..., RECORDING/heldout-000000.parquet ...
                                                README.md, the card

A row is a sequence. The schema of every file says which shard of which cache the file was made of. So a later attempt
keeps finished files, and refuses files of another cache.

Legend: B sequences, L targets of a sequence, K kept ids, D distinct ids of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from capgap.pipeline.interchange.card import CARD_NAME, card
from capgap.pipeline.interchange.export_facts import KEY, ExportFacts, facts_of
from capgap.pipeline.stage.manifests import finished_cache, require_of_tokens
from capgap.pipeline.stage.progress import progress
from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.files import atomic_file, write_atomically
from capgap.schemas.errors import MismatchError, SettingError
from capgap.schemas.facts import CacheFacts, heldout_set
from capgap.schemas.records import ChunkTargets, SampledTargets, Sequences, Targets, TopkTargets
from capgap.schemas.run_cache import RecordingName

_ROW_GROUP_TARGETS = 8192


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        folder: Folder that holds the files.
        num_files: Number of Parquet files in it.
        num_kept_files: Number of those files that an earlier export had finished.
        num_bytes: Size of all files in bytes.
    """

    folder: Path
    num_files: int
    num_kept_files: int
    num_bytes: int


def export_cache(location: str, folder: Path, recordings: tuple[RecordingName, ...] = ()) -> Exported:
    """Write the recordings of a finished cache, by default all of them, and a card.

    Raises:
        InputError: There is no finished cache.
        SettingError: The cache has no such recording.
        MismatchError: The folder holds the export of another cache.
        CorruptError: A member of the cache is damaged.
    """
    at, manifest = finished_cache(location, "cannot be exported")
    facts = CacheFacts.model_validate(manifest.facts)
    require_of_tokens(facts, location, "cannot be exported")
    chosen = recordings or tuple(sorted(facts.recordings))
    for name in chosen:
        if name not in facts.recordings:
            raise SettingError(
                "the cache has no such recording", where="--recording", found=name,
                expected=f"one of {', '.join(sorted(facts.recordings))}",
            )  # fmt: skip
    parts = [
        (name, split, manifest.shard_sets[set_name])
        for name in chosen
        for split, set_name in (("train", name), ("heldout", heldout_set(name)))
        if set_name in manifest.shard_sets and manifest.shard_sets[set_name].shards
    ]
    folder.mkdir(parents=True, exist_ok=True)
    num_files = num_kept_files = num_bytes = 0
    with progress("export", sum(len(shards.shards) for *_, shards in parts), "shards") as meter:
        for name, split, shards in parts:
            reader = ShardReader(at, shards)
            (folder / name).mkdir(exist_ok=True)
            for number, shard in enumerate(shards.shards):
                path = folder / name / f"{split}-{number:06d}.parquet"
                said = ExportFacts(
                    cache=manifest.content,
                    shard=shard.file.sha256,
                    recording=name,
                    facts=facts.recordings[name],
                    tokenizer=facts.tokenizer,
                    context=facts.context,
                    temperature=facts.temperature,
                )
                is_there = _is_finished(path, said)
                if not is_there:
                    _write(path, reader, number, said)
                num_files, num_kept_files = num_files + 1, num_kept_files + is_there
                num_bytes += path.stat().st_size
                meter.advance(tokens=shard.num_sequences * shards.seq_len)
    write_atomically(
        folder / CARD_NAME, card(location, manifest, facts, {(name, split): s for name, split, s in parts})
    )
    return Exported(folder, num_files, num_kept_files, num_bytes)


def _is_finished(path: Path, expected: ExportFacts) -> bool:
    """Return whether an earlier export wrote this file, which gets its name only when it is whole."""
    if not path.is_file():
        return False
    found = facts_of(path)
    if found != expected:
        raise MismatchError(
            "the folder holds something else",
            where=path,
            found="no export of a cache" if found is None else f"an export of cache {found.cache[:12]}",
            expected=f"of cache {expected.cache[:12]}",
            fix="name another folder with --to",
        )
    return True


def _write(path: Path, reader: ShardReader, number: int, said: ExportFacts) -> None:
    shard = reader.shard_set.shards[number]
    kinds = _schema(said, bool(reader.codec.extra_temperatures)).with_metadata({KEY: said.model_dump_json()})
    group = max(1, _ROW_GROUP_TARGETS // reader.shard_set.seq_len)
    with atomic_file(path) as file, pa.parquet.ParquetWriter(file, kinds, compression="zstd") as writer:
        for member in range(len(shard.members)):
            sequences, targets = reader.read_member(number, member)
            assert targets is not None
            table = pa.table(dict(_columns(sequences, targets, kinds)), schema=kinds)
            writer.write_table(table, row_group_size=group)


def _schema(said: ExportFacts, with_further_tails: bool) -> pa.Schema:
    flags, numbers = pa.list_(pa.bool_()), pa.list_(pa.float32())
    kinds = {"input_ids": pa.list_(pa.int32()), "starts": flags, "loss_mask": flags}
    kinds["ids"] = pa.list_(pa.list_(pa.int32()))
    if said.recording == "sampled":
        kinds["counts"] = pa.list_(pa.list_(pa.int32()))
    else:
        kinds |= {"logprobs": pa.list_(numbers), "tail": numbers}
        if with_further_tails:
            kinds["log_tails"] = pa.list_(numbers)
    return pa.schema([*kinds.items(), ("label_logprobs", numbers)])


def _columns(sequences: Sequences, targets: Targets, kinds: pa.Schema) -> Iterator[tuple[str, pa.Array]]:
    assert not isinstance(targets, ChunkTargets), "refused before"
    yield "input_ids", _lists(sequences.tokens_BL1)
    yield "starts", _lists(sequences.starts_BL1)
    yield "loss_mask", _lists(sequences.mask_BL1)
    if isinstance(targets, SampledTargets):
        sizes_BL = targets.num_ids_BL
        yield "ids", _nested(targets.ids_D, sizes_BL)
        yield "counts", _nested(targets.counts_D, sizes_BL)
    else:
        yield from _topk_columns(targets, kinds)
    labels_BL = targets.label_logprobs_BL
    # null, because other programs skip null and not NaN
    yield "label_logprobs", _lists(labels_BL, np.isnan(labels_BL))


def _topk_columns(targets: TopkTargets, kinds: pa.Schema) -> Iterator[tuple[str, pa.Array]]:
    is_id_BLK = np.isfinite(targets.logprobs_BLK)
    sizes_BL = is_id_BLK.sum(axis=2)
    yield "ids", _nested(targets.ids_BLK[is_id_BLK], sizes_BL)
    yield "logprobs", _nested(targets.logprobs_BLK[is_id_BLK], sizes_BL)
    yield "tail", _lists(targets.tail_BL)
    if "log_tails" in kinds.names:
        log_tails_BLT = targets.log_tails_BLT
        yield "log_tails", _nested(log_tails_BLT.ravel(), np.full(sizes_BL.shape, log_tails_BLT.shape[2]))


def _lists(values_BL: npt.NDArray[Any], is_null_BL: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    width = values_BL.shape[1]
    flat = pa.array(values_BL.ravel(), mask=None if is_null_BL is None else is_null_BL.ravel())
    return pa.ListArray.from_arrays(pa.array(np.arange(0, values_BL.size + 1, width, dtype=np.int32)), flat)


def _nested(values_D: npt.NDArray[Any], sizes_BL: npt.NDArray[Any]) -> pa.Array:
    """Return one list per target, of these sizes, within one list per sequence."""
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes_BL.ravel(), dtype=np.int64)])
    inner = pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(np.ascontiguousarray(values_D)))
    outer = np.arange(0, sizes_BL.size + 1, sizes_BL.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(outer), inner)
