from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from capgap.pipeline.store import Block, ShardReader, ShardWriter, split_blocks
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK, TOPK_CODECS, Codec
from capgap.pipeline.store.files import sha256_of
from capgap.schemas.records import Sequences


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    folder = tmp_path / "shards"
    folder.mkdir()
    return folder, tmp_path / "work" / "sidecars"


@pytest.fixture
def writer(folders: tuple[Path, Path], codecs) -> ShardWriter:
    return ShardWriter(*folders, "targets", codecs[SAMPLED])


def _files(folders: tuple[Path, Path]) -> list[str]:
    return sorted(path.name for folder in folders for path in folder.iterdir())


def test_a_shard_is_a_tar_and_a_sidecar(folders, writer, codecs, make_block) -> None:
    entry = writer.write(7, [make_block(codecs[SAMPLED], 3), make_block(codecs[SAMPLED], 2)])
    assert _files(folders) == ["targets-000007.json", "targets-000007.tar"]
    path = folders[0] / "targets-000007.tar"
    assert entry.num_sequences == 5
    assert entry.members.num_sequences == (3, 2)
    assert (entry.file.path, entry.file.num_bytes) == (path.name, path.stat().st_size)
    assert entry.file.sha256 == sha256_of(path)
    assert writer.finished(7) == entry
    assert writer.finished(6) is None


@pytest.mark.parametrize("name", [SEQUENCES, SAMPLED, TOPK])
def test_offsets_are_where_the_tar_says_its_members_lie(folders, codecs, make_block, name: str) -> None:
    entry = ShardWriter(*folders, "a", codecs[name]).write(0, [make_block(codecs[name], n, n) for n in (1, 4, 2)])
    with tarfile.open(folders[0] / "a-000000.tar") as tar:
        expected = [(m.name.removesuffix(".arrow.zst"), m.offset_data, m.size) for m in tar]
    assert [(m.key, m.offset, m.num_bytes) for m in entry.each_member()] == expected


@pytest.mark.parametrize("sizes", [(), (3,), (1, 4, 2)])
def test_the_bytes_are_those_of_a_plain_ustar_file(folders, codecs, make_block, sizes) -> None:
    """WebDataset's writer leaves the format of the tar to Python, whose own choice is another."""
    blocks = [make_block(codecs[TOPK], size, size) for size in sizes]
    entry = ShardWriter(*folders, "heldout-sampled", codecs[TOPK]).write(123456, blocks)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member, block in zip(entry.each_member(), blocks, strict=True):
            data = codecs[TOPK].encode(block.sequences, block.targets)
            info = tarfile.TarInfo(f"{member.key}.arrow.zst")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert (folders[0] / "heldout-sampled-123456.tar").read_bytes() == plain.getvalue()


def _blocks_until(error: Exception, blocks: list[Block]) -> Iterator[Block]:
    yield from blocks
    raise error


@pytest.mark.parametrize("num_blocks", [0, 1, 40])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_exception_in_the_middle_leaves_nothing(folders, writer, codecs, make_block, error, num_blocks) -> None:
    blocks = [make_block(codecs[SAMPLED], 2)] * num_blocks
    with pytest.raises(type(error)):
        writer.write(0, _blocks_until(error, blocks))
    assert _files(folders) == []
    assert writer.finished(0) is None


def test_an_exception_while_a_shard_is_replaced_leaves_no_finished_shard(folders, writer, codecs, make_block) -> None:
    writer.write(0, [make_block(codecs[SAMPLED], 2)])
    with pytest.raises(RuntimeError):
        writer.write(0, _blocks_until(RuntimeError(), [make_block(codecs[SAMPLED], 3)]))
    assert writer.finished(0) is None
    assert [path.name for path in folders[1].iterdir()] == []


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-512], id="truncated by a block"),
        pytest.param(lambda data: data[:-1], id="truncated by a byte"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data + b"\0", id="longer"),
        pytest.param(lambda data: data[:600] + bytes([data[600] ^ 1]) + data[601:], id="a bit of a member"),
        pytest.param(lambda data: bytes([data[0] ^ 1]) + data[1:], id="a bit of a name"),
        pytest.param(lambda data: data[:-1] + b"\1", id="a bit of the padding"),
    ],
)
def test_an_altered_file_is_not_a_finished_shard(folders, writer, codecs, make_block, damage) -> None:
    writer.write(0, [make_block(codecs[SAMPLED], 2)])
    path = folders[0] / "targets-000000.tar"
    assert writer.finished(0) is not None
    path.write_bytes(damage(path.read_bytes()))
    assert writer.finished(0) is None


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.unlink(), id="gone"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-5]), id="cut short"),
        pytest.param(lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()), id="no text"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".tar"])
def test_tar_and_sidecar_must_both_be_whole(folders, writer, codecs, make_block, damage, suffix: str) -> None:
    writer.write(0, [make_block(codecs[SAMPLED], 2)])
    damage(folders[suffix == ".json"] / f"targets-000000{suffix}")
    assert writer.finished(0) is None


@pytest.mark.parametrize("name", [SEQUENCES, SAMPLED, TOPK])
def test_two_writes_of_one_shard_are_byte_identical(tmp_path: Path, codecs, make_block, name: str) -> None:
    written = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        writer = ShardWriter(tmp_path / place, tmp_path / f"{place}-sidecars", "targets", codecs[name])
        entry = writer.write(3, [make_block(codecs[name], size, size) for size in (4, 1)])
        written.append((entry, (tmp_path / place / "targets-000003.tar").read_bytes()))
    assert written[0] == written[1]


# A writer that is killed a moment after one of its blocks: each child begins with shard 0 and goes on until its end.
_KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from capgap.pipeline.store import Block, ShardWriter
from capgap.pipeline.store.codec import SEQUENCES, Codec
from capgap.schemas.records import Sequences

def write_for_ever(folder, began):
    writer = ShardWriter(folder, folder / "sidecars", "targets", Codec(SEQUENCES, 63, 50000))
    def blocks(index):
        for number in range(6):
            tokens = np.random.default_rng([index, number]).integers(0, 50000, (128, 64), dtype=np.int32)
            yield Block(Sequences(tokens, tokens % 7 == 0, tokens % 5 > 0))
            os.write(began, b".")
    for index in range(10**6):
        writer.write(index, blocks(index))

for number in range(int(sys.argv[2])):
    folder = Path(sys.argv[1]) / str(number)
    folder.mkdir()
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        write_for_ever(folder, write_end)
    for _ in range(number + 1):
        os.read(read_end, 1)
    time.sleep(random.uniform(0, 0.002))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
"""


def test_a_killed_writer_leaves_no_shard_that_is_taken_for_finished_and_is_not(tmp_path: Path) -> None:
    num_kills = 20
    script = [sys.executable, "-c", _KILLS, str(tmp_path), str(num_kills)]
    subprocess.run(script, check=True, timeout=1800)
    codec = Codec(SEQUENCES, 63, 50000)
    finished = temporary = 0
    for number in range(num_kills):
        folder = tmp_path / str(number)
        writer = ShardWriter(folder, folder / "sidecars", "targets", codec)
        temporary += len(list(folder.glob("*.partial-*")))
        entries = [writer.finished(index) for index in range(200)]
        whole = [entry for entry in entries if entry is not None]
        assert entries[: len(whole)] == whole, "shards are finished in order"
        finished += len(whole)
        for index, entry in enumerate(whole):
            assert entry.num_sequences == 6 * 128
            _assert_written(ShardReader(folder, writer.shard_set([entry])), index)
    assert temporary > 5, "no writer was killed in the middle of a shard, so nothing was tested"
    assert finished > 5, "no writer finished a shard, so nothing was tested"


def _assert_written(reader: ShardReader, index: int) -> None:
    for number in range(reader.shard_set.num_members):
        tokens_BL1 = np.random.default_rng([index, number]).integers(0, 50000, (128, 64), dtype=np.int32)
        assert np.array_equal(reader.read(number)[0].tokens_BL1, tokens_BL1)


def test_a_writer_killed_before_its_first_shard_is_whole_leaves_no_shard_under_its_name(tmp_path: Path) -> None:
    endless = _KILLS.replace("range(6)", "range(10**6)").replace("range(number + 1)", "range(20)")
    subprocess.run([sys.executable, "-c", endless, str(tmp_path), "1"], check=True, timeout=1800)
    folder = tmp_path / "0"
    assert [path.name for path in (folder / "sidecars").iterdir()] == []
    (left,) = folder.glob("*.*")
    assert left.name.startswith("targets-000000.tar.partial-") and left.stat().st_size > 0
    assert ShardWriter(folder, folder / "sidecars", "targets", Codec(SEQUENCES, 63, 50000)).finished(0) is None


@pytest.mark.parametrize(("num_sequences", "seq_len"), [(1, 8), (7, 4096), (50, 256), (64, 256), (65, 256), (3, 20000)])
def test_blocks_are_the_sequences_in_order_at_the_size_of_a_member(num_sequences: int, seq_len: int) -> None:
    shape = (num_sequences, seq_len + 1)
    tokens_BL1 = np.arange(num_sequences * (seq_len + 1), dtype=np.int32).reshape(shape)
    sequences = Sequences(tokens_BL1, tokens_BL1 % 3 == 0, tokens_BL1 % 2 == 0)
    blocks = list(split_blocks(sequences))
    for name in ("tokens_BL1", "starts_BL1", "mask_BL1"):
        joined = np.concatenate([getattr(block, name) for block in blocks])
        assert np.array_equal(joined, getattr(sequences, name))
    # a sequence of more than 8192 targets is a member of its own; the last block may be smaller
    largest = max(1, 8192 // seq_len)
    assert all(len(block) == largest for block in blocks[:-1]) and 0 < len(blocks[-1]) <= largest


@pytest.mark.parametrize(("name", "num_ids"), [("lossless", 50_000), ("near-lossless", 40_000), ("small", 60_000)])
def test_blocks_of_large_targets_are_small_enough_for_every_reader(name: str, num_ids: int) -> None:
    tokens_BL1 = np.zeros((64, 257), np.int32)
    sequences = Sequences(tokens_BL1, tokens_BL1 > 0, tokens_BL1 > 0)
    large, usual = (Codec(TOPK_CODECS[name], 256, 128_000, kept) for kept in (num_ids, 64))
    blocks = list(split_blocks(sequences, usual, large))
    assert sum(map(len, blocks)) == 64
    # readers accept at most 2^30 bytes; one more sequence would be more than that, less the 64 KiB of the schema
    most = len(blocks[0])
    assert most < 32 and max(map(len, blocks)) == most
    assert most * large.sequence_bytes < (1 << 30) <= (most + 1) * large.sequence_bytes + (1 << 16)
    assert [len(block) for block in split_blocks(sequences, usual)] == [32, 32]
