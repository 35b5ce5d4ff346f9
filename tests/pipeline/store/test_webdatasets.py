"""A cache's shard sets as WebDataset pipelines: every sequence once, and the very bits of the reader."""

from __future__ import annotations

import dataclasses
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from capgap.pipeline.store import LoaderSettings, SequenceLoader, ShardReader
from capgap.pipeline.store.batch import Batch, TargetTemperature, collate
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK, TOPK_CODECS
from capgap.pipeline.store.samples import SampleShape, collate_samples
from capgap.pipeline.store.webdatasets import MemberDecoder, webdataset_of
from capgap.schemas.errors import CorruptError, InputError

SIZES = ((3, 1), (4,), (2, 2, 1))
KEYS = [
    f"targets-{shard:06d}-{member:04d}-{row:04d}"
    for shard, members in enumerate(SIZES)
    for member, size in enumerate(members)
    for row in range(size)
]


@pytest.fixture
def reader(codecs, make_reader) -> ShardReader:
    return make_reader(codecs[SAMPLED], SIZES)


def shape_of(reader: ShardReader, **others: Any) -> SampleShape:
    return SampleShape(reader.codec.num_ids, **others)


def urls(reader: ShardReader) -> list[str]:
    return [reader.place.name_of(shard.file) for shard in reader.shard_set.shards]


def keys(samples: Iterable[dict[str, Any]]) -> list[str]:
    return [sample["__key__"] for sample in samples]


def same(found: Batch, expected: Batch) -> bool:
    for here, there in zip(found.tensors().values(), expected.tensors().values(), strict=True):
        if (here is None) != (there is None):
            return False
        if here is not None and (here.dtype, here.shape, here.numpy().tobytes()) != (
            there.dtype,
            there.shape,
            there.numpy().tobytes(),
        ):
            return False
    return True


@pytest.mark.parametrize("context", ["packed", "document"])
@pytest.mark.parametrize("name", [SEQUENCES, SAMPLED, *TOPK_CODECS.values()])
def test_every_sequence_comes_once_with_the_bits_of_the_reader(ranked_codecs, make_reader, name: str, context) -> None:
    reader = make_reader(ranked_codecs[name], SIZES)
    samples = list(webdataset_of(reader, shape_of(reader, context=context)))
    assert keys(samples) == KEYS
    numbered = iter(samples)
    for index in range(reader.shard_set.num_members):
        block = reader.read(index)
        for row in range(len(block[0])):
            sample, expected = next(numbered), collate([(*block, row)], reader.codec.num_ids, None, context)
            assert same(collate_samples([sample]), expected)
            assert np.array_equal(sample["tokens"], block[0].tokens_BL1[row])
            assert np.array_equal(sample["starts"], block[0].starts_BL1[row])
            assert np.array_equal(sample["mask"], block[0].mask_BL1[row])
            assert ("positions" in sample) == (context == "document")
            if block[1] is not None:
                assert sample["label_logprobs"].tobytes() == block[1].label_logprobs_BL[row].tobytes()
                length, num_ids = reader.codec.seq_len, reader.codec.num_ids
                assert (sample["ids"].dtype, sample["ids"].shape) == (np.int64, (length, num_ids))
                assert (sample["weights"].dtype, sample["weights"].shape) == (np.float32, (length, num_ids))
            assert ("tail" in sample) == (name in TOPK_CODECS.values())


@pytest.mark.parametrize("name", [SAMPLED, TOPK])
def test_a_batch_is_the_very_one_of_the_loader(codecs, make_reader, name: str) -> None:
    reader = make_reader(codecs[name], SIZES)
    by_tokens = {s["tokens"].tobytes(): s for s in webdataset_of(reader, shape_of(reader))}
    loader = SequenceLoader(reader, LoaderSettings(4, 0))
    for number, batch in enumerate(loader):
        places = loader.places(number)
        wanted = [reader.read_member(*place[:2])[0].tokens_BL1[place.row].astype(np.int64) for place in places]
        assert same(collate_samples([by_tokens[tokens.tobytes()] for tokens in wanted]), batch)


def test_targets_come_at_a_further_temperature(make_reader, codecs) -> None:
    reader = make_reader(dataclasses.replace(codecs[TOPK], extra_temperatures=(2.0,)), SIZES)
    target = TargetTemperature(0, reader.codec.powers[0])
    first = next(iter(webdataset_of(reader, shape_of(reader, target_temperature=target))))
    assert same(collate_samples([first]), collate([(*reader.read(0), 0)], reader.codec.num_ids, target))


def test_a_shuffle_permutes_members_anew_each_epoch_and_follows_from_the_seed(reader: ShardReader) -> None:
    samples = webdataset_of(reader, shape_of(reader), shuffle=True, seed=5)
    first, second = keys(samples), keys(samples)
    assert first != KEYS and first != second
    assert sorted(first) == sorted(second) == KEYS
    again = webdataset_of(reader, shape_of(reader), shuffle=True, seed=5)
    assert [keys(again), keys(again)] == [first, second]


@pytest.mark.parametrize("num_workers", [2, 7])
def test_workers_of_a_loader_read_every_sequence_once_however_few_the_shards(
    reader: ShardReader, num_workers: int
) -> None:
    samples = webdataset_of(reader, shape_of(reader), shuffle=True).shuffle(10)
    loader = wds.WebLoader(samples, batch_size=None, num_workers=num_workers)
    assert sorted(keys(loader)) == KEYS
    assert sorted(keys(loader)) == KEYS


def test_a_loader_s_workers_hand_out_batches(reader: ShardReader) -> None:
    samples = webdataset_of(reader, shape_of(reader))
    loader = wds.WebLoader(samples.batched(2, collation_fn=collate_samples), batch_size=None, num_workers=2)
    found = list(loader)
    assert all(isinstance(batch, Batch) for batch in found)
    assert sum(len(batch.input_ids_BL) for batch in found) == len(KEYS)
    stacked = next(iter(samples.batched(3)))
    assert stacked["ids"].shape == (3, reader.codec.seq_len, reader.codec.num_ids)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_read_every_sequence_once_together(reader: ShardReader, monkeypatch, world_size: int) -> None:
    found: Counter[str] = Counter()
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        mine = keys(webdataset_of(reader, shape_of(reader), shuffle=True, seed=rank))
        assert mine
        found.update(mine)
    assert found == Counter(KEYS)


def test_a_rank_without_a_member_is_refused_before_it_waits_for_the_others(reader: ShardReader, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(InputError, match="found 6 members, 7 ranks"):
        next(iter(webdataset_of(reader, shape_of(reader))))
    assert keys(webdataset_of(reader, shape_of(reader), nodesplitter=None)) == KEYS


def test_it_is_mixed_with_another_source(reader: ShardReader, tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "other.tar")) as tar:
        for number in range(5):
            tar.write({"__key__": f"text-{number}", "txt": f"line {number}"})
    other = wds.WebDataset(str(tmp_path / "other.tar"), shardshuffle=False).decode()
    mixed = wds.RandomMix([webdataset_of(reader, shape_of(reader)), other], [0.5, 0.5], longest=True)
    assert sorted(keys(mixed)) == sorted([*KEYS, *(f"text-{number}" for number in range(5))])


def test_the_pipeline_and_the_decoder_can_be_sent_to_a_process_that_is_started_afresh(reader: ShardReader) -> None:
    samples, decoder = pickle.loads(
        pickle.dumps((webdataset_of(reader, shape_of(reader)), MemberDecoder(reader, shape_of(reader))))
    )
    assert keys(samples) == KEYS
    assert keys(wds.WebDataset(urls(reader), shardshuffle=False).compose(decoder)) == KEYS


def test_a_flipped_bit_is_damage_that_names_the_member(reader: ShardReader) -> None:
    path, member = Path(urls(reader)[2]), reader.shard_set.shards[2].member(1)
    data = bytearray(path.read_bytes())
    data[member.offset + member.num_bytes // 2] ^= 1
    path.write_bytes(data)
    for samples in (
        webdataset_of(reader, shape_of(reader)),
        wds.WebDataset(urls(reader), shardshuffle=False).compose(MemberDecoder(reader, shape_of(reader))),
    ):
        found: list[str] = []
        with pytest.raises(CorruptError, match=r"member targets-000002-0001.*checksum mismatch"):
            found.extend(sample["__key__"] for sample in samples)


@pytest.mark.parametrize("name", [SAMPLED, TOPK])
def test_the_decoder_gives_what_the_pipeline_gives(codecs, make_reader, name: str) -> None:
    reader = make_reader(codecs[name], SIZES)
    source = wds.WebDataset(urls(reader), shardshuffle=False)
    decoded = list(source.compose(MemberDecoder(reader, shape_of(reader))))
    for found, expected in zip(decoded, webdataset_of(reader, shape_of(reader)), strict=True):
        assert found.keys() == expected.keys()
        assert (found["__key__"], found["__url__"]) == (expected["__key__"], expected["__url__"])
        for field in (field for field in found if not field.startswith("__")):
            assert (found[field].dtype, found[field].tobytes()) == (expected[field].dtype, expected[field].tobytes())


def test_members_that_webdataset_drops_behind_a_damaged_header_are_missed(reader: ShardReader) -> None:
    path, member = Path(urls(reader)[2]), reader.shard_set.shards[2].member(1)
    data = bytearray(path.read_bytes())
    data[member.offset - 512 + 150] ^= 1  # in the header's checksum
    path.write_bytes(data)
    alone = wds.WebDataset(urls(reader), shardshuffle=False)
    assert len(list(alone)) == 4, "the hazard is gone, so the test below proves nothing"
    with pytest.raises(CorruptError, match="ended before its last member; found 1 members, expected 3"):
        list(alone.compose(MemberDecoder(reader, shape_of(reader))))
    assert len(list(alone.compose(MemberDecoder(reader, shape_of(reader), whole_shards=False)))) == 10
    # read by offsets, the shard is whole
    assert keys(webdataset_of(reader, shape_of(reader))) == KEYS


def test_members_may_be_shuffled_and_shards_repeated_before_they_are_decoded(reader: ShardReader) -> None:
    twice = wds.WebDataset(urls(reader) * 2, shardshuffle=False).shuffle(20, initial=20)
    found = Counter(keys(twice.compose(MemberDecoder(reader, shape_of(reader)))))
    assert found == Counter({key: 2 for key in KEYS})


class _Touch:
    """Unpickled, it writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path(self.path),)


def test_no_code_of_a_shard_is_run(reader: ShardReader, tmp_path: Path) -> None:
    """A stranger's shard has a pickle beside each member, under the same key."""
    honest, mark = Path(urls(reader)[0]), tmp_path / "mark"
    with tarfile.open(honest) as tar:
        members = [(member.name.split(".")[0], tar.extractfile(member).read()) for member in tar]
    honest.unlink()
    with wds.TarWriter(str(honest), encoder=False) as tar:
        for key, data in members:
            tar.write({"__key__": key, "arrow.zst": data, "pyd": pickle.dumps(_Touch(str(mark)))})

    def alone() -> Iterator[Any]:
        return wds.WebDataset(str(honest), shardshuffle=False)

    assert keys(alone().compose(MemberDecoder(reader, shape_of(reader)))) == KEYS[:4]
    assert not mark.exists()
    next(iter(alone().decode()))
    assert mark.exists(), "the hazard is gone, so the test above proves nothing"


def test_a_sample_of_another_source_is_refused_and_named(reader: ShardReader) -> None:
    decoder = MemberDecoder(reader, shape_of(reader))
    with pytest.raises(InputError, match=r"found 'text-0', expected a member of the cache"):
        list(decoder([{"__key__": "text-0", "txt": b"line"}]))
    with pytest.raises(InputError, match="without its bytes"):
        list(decoder([{"__key__": "targets-000000-0000", "txt": b"line"}]))
