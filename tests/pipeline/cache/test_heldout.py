"""Held-out sequences in a cache: shard sets of their own, made like the others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capgap.pipeline.cache import stage
from capgap.pipeline.stage.context import Instance, Slice
from capgap.pipeline.store import ShardReader, check_alignment
from capgap.pipeline.verify.verify import verify
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.slices import carry_out_slice
from capgap.schemas.facts import heldout_set
from capgap.schemas.manifest import Manifest, ShardEntry, ShardSet

CACHE = Instance("cache")
BOTH = {"recording": "both", "top_k": 12}


def _files(manifest: Manifest) -> dict[str, str]:
    return {file.path: file.sha256 for file in manifest.files}


@pytest.mark.parametrize(("wanted", "in_shards"), [(0, []), (3, [8]), (9, [8, 8]), (10_000, None)])
def test_the_first_held_out_sequences_are_scored_beside_in_whole_blocks(run, wanted: int, in_shards) -> None:
    tiny = run(**BOTH, num_heldout_sequences=wanted)
    corpus, manifest = carry_out(tiny, Instance("corpus")), carry_out(tiny, CACHE)
    text = ShardReader(Path(tiny.out) / "corpus", corpus.shard_sets["heldout"])
    if in_shards is None:
        in_shards = [shard.num_sequences for shard in text.shard_set.shards]
    assert list(manifest.shard_sets)[:2] == ["sampled", "topk"]
    assert manifest.totals["num_tokens"] == corpus.shard_sets["student"].num_tokens
    assert manifest.totals["num_heldout_tokens"] == sum(in_shards) * 32
    for name in ("sampled", "topk"):
        assert (heldout_set(name) in manifest.shard_sets) == bool(in_shards)
        if not in_shards:
            continue
        reader = ShardReader(Path(tiny.out) / "cache", manifest.shard_sets[heldout_set(name)])
        assert [shard.num_sequences for shard in reader.shard_set.shards] == in_shards
        for index in range(reader.shard_set.num_members):
            sequences, targets = reader.read(index)
            assert np.array_equal(sequences.tokens_BL1, text.read(index)[0].tokens_BL1)
            check_alignment(sequences, targets, reader.codec.num_ids, "here", reader.codec.error)


def test_a_shard_is_cut_after_the_block_that_has_enough(run) -> None:
    """Members of 3, 3 and 2 sequences: as they would be with longer ones."""
    shard = ShardEntry.model_validate(
        {
            "file": {"path": "heldout-000000.tar", "num_bytes": 1, "sha256": ""},
            "num_sequences": 8,
            "members": {"offset": (0, 9, 18), "num_bytes": (9, 9, 9), "num_sequences": (3, 3, 2), "crc32": (1, 2, 3)},
        }
    )
    heldout = ShardSet(codec="", codec_settings={}, seq_len=32, shards=(shard, shard))
    found = {n: [one.num_sequences for one in stage._first_blocks(heldout, n)] for n in (0, 1, 3, 4, 8, 9, 12, 99)}
    assert found == {0: [], 1: [3], 3: [3], 4: [6], 8: [8], 9: [8, 3], 12: [8, 6], 99: [8, 8]}
    assert [len(one.members) for one in stage._first_blocks(heldout, 12)] == [3, 2]
    assert stage._first_blocks(None, 5) == ()


def test_training_shards_are_the_same_with_and_without_held_out_ones(run) -> None:
    without = carry_out(run(**BOTH), CACHE)
    beside = carry_out(run(**BOTH, num_heldout_sequences=9), CACHE, remake=True)
    assert without.shard_sets == {name: beside.shard_sets[name] for name in ("sampled", "topk")}
    assert _files(without).items() < _files(beside).items()
    assert without.totals | {"num_heldout_tokens": 16 * 32} == beside.totals
    scored = [made.facts.pop("scored") for made in (without, beside)]
    assert without.facts == beside.facts
    assert scored[0] == scored[1][: len(scored[0])]


def test_a_killed_stage_makes_only_the_held_out_shards_that_are_missing(run, context_of) -> None:
    tiny = run(**BOTH, num_heldout_sequences=9)
    whole = carry_out(tiny, CACHE)
    context = context_of(tiny)
    shutil.rmtree(context.folder)
    context = context_of(tiny)
    first = stage.run(context)
    (context.folder / "heldout-topk-000001.tar").unlink()
    kept = {path: path.stat().st_mtime_ns for path in context.folder.glob("*.tar")}
    second = stage.run(context)
    assert first.shard_sets == second.shard_sets == whole.shard_sets
    again = {path.name for path, then in kept.items() if path.stat().st_mtime_ns != then}
    assert again == {"heldout-sampled-000001.tar"}, "a shard's recordings are made in one pass"


def test_slices_make_held_out_shards_too(run) -> None:
    tiny = run(num_heldout_sequences=9)
    whole = carry_out(tiny, CACHE)
    shutil.rmtree(Path(tiny.out) / "cache")
    found: list[Any] = [carry_out_slice(tiny, CACHE, Slice(number, 2)) for number in (0, 1)]
    assert found[0] is None and found[1].content == whole.content


def test_verify_reads_held_out_shards_too(run) -> None:
    tiny = run(num_heldout_sequences=9)
    manifest = carry_out(tiny, CACHE)
    num_members = sum(shard_set.num_members for shard_set in manifest.shard_sets.values())
    assert f", {num_members} members," in "\n".join(verify(Path(tiny.out) / "cache"))
