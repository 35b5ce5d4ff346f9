"""Legend: B sequences, L1 tokens a sequence, V vocabulary."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from capgap.pipeline.store import Ranking, ShardReader, rank_ids
from capgap.pipeline.store.codec import SAMPLED
from capgap.pipeline.store.files import sha256_of
from capgap.pipeline.store.ranking import COUNTS_NAME, count_ids, read_counts, read_ranking, write_counts
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.manifest import FileEntry
from capgap.schemas.records import Sequences


def _block(tokens_BL1: list[list[int]]) -> Sequences:
    tokens = np.array(tokens_BL1, np.int32)
    return Sequences(tokens, tokens < 0, tokens >= 0)


def test_ids_lie_by_falling_frequency_and_equals_by_id() -> None:
    ranking = rank_ids([_block([[5, 5, 1]]), _block([[5, 3, 1], [4, 4, 0]])], 7)
    assert ranking.ids_V.tolist() == [5, 1, 4, 0, 3, 2, 6]
    assert ranking.ranks_V[ranking.ids_V].tolist() == list(range(7))


def test_counts_of_ids_come_back_from_their_file_and_damage_is_named(tmp_path: Path) -> None:
    counts = {"student": count_ids([_block([[5, 5, 1]])], 7), "heldout": np.arange(7, dtype=np.int64)}
    write_counts(tmp_path, counts)
    path = tmp_path / COUNTS_NAME
    entry = FileEntry(path=COUNTS_NAME, num_bytes=path.stat().st_size, sha256=sha256_of(path))
    for split, counts_V in counts.items():
        assert np.array_equal(read_counts(tmp_path, [entry], split, 7), counts_V)
    for files, split, vocab_size in (([entry], "teacher", 7), ([entry], "student", 8), ([], "student", 7)):
        with pytest.raises(CorruptError, match=r"the counts of ids are not what they were; .*; make the corpus again"):
            read_counts(tmp_path, files, split, vocab_size)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match="another file than the manifest lists"):
        read_counts(tmp_path, [entry], "student", 7)


def test_a_ranking_comes_back_from_its_file() -> None:
    ranking = Ranking(np.random.default_rng(0).permutation(1000).astype(np.int32))
    assert ranking.sha256 == hashlib.sha256(ranking.data).hexdigest()
    assert np.frombuffer(ranking.data, "<u4").tolist() == ranking.ids_V.tolist()
    found = read_ranking(ranking.data, ranking.sha256, 1000, "here")
    assert found == ranking and (found.ids_V == ranking.ids_V).all()


def test_another_file_than_the_manifest_names_is_refused() -> None:
    ranking = Ranking(np.arange(9, dtype=np.int32))
    with pytest.raises(CorruptError, match=r"the file: the ranking of ids is not what it was; found sha256 .* ex"):
        read_ranking(ranking.data[:-1] + b"\1", ranking.sha256, 9, "the file")


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 1], [0, 1, 3], [0, 1, 2, 3], []])
def test_what_is_no_permutation_is_refused_though_its_digest_holds(ids: list[int]) -> None:
    data = np.array(ids, "<u4").tobytes()
    with pytest.raises(CorruptError, match="here: not a ranking of ids; expected each id from 0 to 2 once"):
        read_ranking(data, hashlib.sha256(data).hexdigest(), 3, "here")


def test_a_size_that_holds_no_whole_number_of_ids_is_refused() -> None:
    data = b"\0\0\0\0\1"
    with pytest.raises(CorruptError, match="not a ranking of ids"):
        read_ranking(data, hashlib.sha256(data).hexdigest(), 1, "here")


def test_shards_whose_ranking_is_missing_or_damaged_are_not_opened(ranked_codecs, make_reader, tmp_path: Path) -> None:
    reader = make_reader(ranked_codecs[SAMPLED], ((2,),))
    path = tmp_path / "shards" / "ids-by-frequency.u32"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="the ranking of ids is not what it was"):
        ShardReader(tmp_path / "shards", reader.shard_set)
    path.unlink()
    with pytest.raises(InputError, match=f"{path}: a file that the shards cannot be read without is missing"):
        ShardReader(tmp_path / "shards", reader.shard_set)


def test_rankings_are_equal_where_their_files_are() -> None:
    one = Ranking(np.arange(4, dtype=np.int32))
    assert one == Ranking(np.arange(4, dtype=np.int32)) and hash(one) == hash(Ranking(np.arange(4, dtype=np.int32)))
    assert one != dataclasses.replace(one, ids_V=np.array([1, 0, 2, 3], np.int32)) != 7
