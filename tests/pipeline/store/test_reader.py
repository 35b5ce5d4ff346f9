from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from capgap.pipeline.store import ShardReader, read_blocks
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK, TOPK_CODECS
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.manifest import Members, ShardSet

NAMES = [SEQUENCES, SAMPLED, *TOPK_CODECS.values()]
SIZES = ((3, 1), (4,), (2, 2, 1))


def _paths(reader: ShardReader, folder: Path) -> list[Path]:
    return [folder / "shards" / shard.file.path for shard in reader.shard_set.shards]


@pytest.mark.parametrize("name", NAMES)
def test_members_come_back_in_any_order(codecs, make_block, make_reader, stored, assert_same, name: str) -> None:
    reader = make_reader(codecs[name], SIZES)
    sizes = [size for of_shard in SIZES for size in of_shard]
    for index in (5, 0, 3, 1, 2, 4, 5):
        assert_same(reader.read(index), stored(codecs[name], make_block(codecs[name], sizes[index], index)))


def test_all_blocks_are_read_in_the_order_of_the_shards(codecs, make_reader, tmp_path: Path) -> None:
    reader = make_reader(codecs[SAMPLED], SIZES)
    assert [len(sequences) for sequences, _ in read_blocks(tmp_path / "shards", reader.shard_set)] == [3, 1, 4, 2, 2, 1]


def test_a_member_that_no_manifest_lists_is_said(codecs, make_reader, tmp_path: Path) -> None:
    reader = make_reader(codecs[SAMPLED], SIZES)
    empty = ShardReader(tmp_path / "shards", reader.shard_set.model_copy(update={"shards": ()}))
    for one, shard, member in ((reader, 3, 0), (reader, 1, 1), (reader, 0, -1), (empty, 0, 0)):
        for read in (one.read_member, one.read_stored):
            with pytest.raises(
                CorruptError, match=rf"lists no such member; found {len(one.shard_set.shards)} shards of"
            ):
                read(shard, member)


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_bit_of_a_member_is_found_and_located(codecs, make_reader, tmp_path: Path, name: str) -> None:
    reader = make_reader(codecs[name], ((1,), (1, 1)))
    path = _paths(reader, tmp_path)[1]
    data = path.read_bytes()
    entry = reader.shard_set.shards[1].member(1)
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * entry.num_bytes):
            place = entry.offset + bit // 8
            _put(file, place, data[place] ^ 1 << bit % 8)
            with pytest.raises(CorruptError) as caught:
                reader.read(2)
            _put(file, place, data[place])
    assert f"{path}, member targets-000001-0001 at byte {entry.offset}: checksum mismatch" in str(caught.value)
    reader.read(2)


def _put(file, place: int, value: int) -> None:
    file.seek(place)
    file.write(bytes([value]))


def test_damage_to_one_member_leaves_the_others_readable(codecs, make_reader, tmp_path: Path) -> None:
    reader = make_reader(codecs[TOPK], ((2, 2, 2),))
    path = _paths(reader, tmp_path)[0]
    with path.open("r+b") as file:
        _put(file, reader.shard_set.shards[0].member(1).offset - 512, 0)  # the name in the second member's header
    assert [len(reader.read(index)[0]) for index in range(3)] == [2, 2, 2]
    with path.open("r+b") as file:
        _put(file, reader.shard_set.shards[0].member(1).offset + 9, 77)
    assert len(reader.read(0)[0]) == len(reader.read(2)[0]) == 2
    with pytest.raises(CorruptError, match="targets-000000-0001"):
        reader.read(1)


@pytest.mark.parametrize("kept", [0, 100, 600])
def test_a_truncated_shard_is_found(codecs, make_reader, tmp_path: Path, kept: int) -> None:
    reader = make_reader(codecs[SAMPLED], ((3,),))
    path = _paths(reader, tmp_path)[0]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CorruptError, match=rf"{path}, member targets-000000-0000 .*found {max(0, kept - 512)} bytes"):
        reader.read(0)


def test_a_missing_shard_is_named(codecs, make_reader, tmp_path: Path) -> None:
    reader = make_reader(codecs[SAMPLED], SIZES)
    path = _paths(reader, tmp_path)[1]
    path.unlink()
    assert len(reader.read(0)[0]) == 3
    with pytest.raises(InputError, match=f"{path}: the shard is missing; rerun the stage"):
        reader.read(2)


def test_another_number_of_sequences_than_the_manifest_says_is_found(codecs, make_reader, tmp_path: Path) -> None:
    reader = make_reader(codecs[SAMPLED], ((3,),))
    with pytest.raises(
        CorruptError, match=r"member targets-000000-0000: wrong number of sequences; found 3, expected 4"
    ):
        ShardReader(tmp_path / "shards", _altered(reader, {"num_sequences": 4})).read(0)


@pytest.mark.parametrize("name", [SAMPLED, TOPK])
def test_targets_of_other_tokens_are_found_though_all_checksums_hold(
    codecs, make_block, make_reader, tmp_path: Path, name: str
) -> None:
    # what the check accepts is tested in test_alignment.py; this holds that a read makes it
    codec = codecs[name]
    data = codec.encode(make_block(codec, 4, seed=9).sequences, make_block(codec, 4).targets)
    reader = make_reader(codec, ((4,),))
    _paths(reader, tmp_path)[0].write_bytes(data)
    member = {"offset": 0, "num_bytes": len(data), "crc32": zlib.crc32(data)}
    with pytest.raises(CorruptError, match=r"member targets-000000-0000, sequence 0, target .* not aligned"):
        ShardReader(tmp_path / "shards", _altered(reader, member)).read(0)


def _altered(reader: ShardReader, update: dict[str, int]) -> ShardSet:
    """What the manifest says, but for the first member."""
    shard = reader.shard_set.shards[0]
    first = {name: values[:1] for name, values in vars(shard.members).items()}
    members = Members(**first | {name: (value,) for name, value in update.items()})
    altered = shard.model_copy(update={"members": members, "num_sequences": sum(members.num_sequences)})
    return reader.shard_set.model_copy(update={"shards": (altered,)})
