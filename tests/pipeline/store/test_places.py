"""Shards behind URLs, from real servers on this machine."""

from __future__ import annotations

import functools
import importlib.util
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch

from capgap.pipeline.store import DiskCache, LoaderSettings, Remote, SequenceLoader, ShardReader, is_url, place_of
from capgap.pipeline.store.codec import SAMPLED
from capgap.pipeline.store.extras import adding
from capgap.schemas.errors import CorruptError, InputError, MachineError

SIZES = ((3, 1), (4,), (2, 2, 1))


@pytest.fixture
def reader(codecs, make_reader) -> ShardReader:
    return make_reader(codecs[SAMPLED], SIZES)


@pytest.fixture
def web(tmp_path) -> Iterator[str]:
    """The URL of the folder with the shards."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/shards"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def bucket(s3_server, reader, tmp_path) -> str:
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir("caches")
    filesystem.put(str(tmp_path / "shards"), "caches/one", recursive=True)
    return "s3://caches/one"


def _assert_reads(url: str, reader: ShardReader, folder: Path) -> None:
    there = ShardReader(place_of(url, DiskCache(folder, 1 << 20)), reader.shard_set)
    alone = SequenceLoader(reader, LoaderSettings(2, 0, num_epochs=2))
    for found, expected in zip(SequenceLoader(there, LoaderSettings(2, 0, num_epochs=2)), alone, strict=True):
        for a, b in zip(found.tensors().values(), expected.tensors().values(), strict=True):
            assert a is b is None or torch.equal(a, b)


def test_a_web_servers_shards_are_those_of_the_disk(reader, web, tmp_path) -> None:
    _assert_reads(web, reader, tmp_path / "copies")


def test_s3s_shards_are_those_of_the_disk(reader, bucket, tmp_path) -> None:
    _assert_reads(bucket, reader, tmp_path / "copies")
    assert len([path for path in (tmp_path / "copies").iterdir() if path.is_file()]) == 3


def test_damage_at_the_source_is_found_on_arrival(reader, web, tmp_path) -> None:
    path = tmp_path / "shards" / reader.shard_set.shards[1].file.path
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # in the padding, which no crc32 covers
    there = ShardReader(place_of(web, DiskCache(tmp_path / "copies", 1 << 20)), reader.shard_set)
    there.read(0)
    with pytest.raises(CorruptError, match=f"{web}/{path.name}: not the file that the manifest lists"):
        there.read(2)


def test_a_copy_that_the_local_disk_has_damaged_is_downloaded_again(reader, web, tmp_path) -> None:
    shard = reader.shard_set.shards[1]
    there = ShardReader(place_of(web, DiskCache(tmp_path / "copies", 1 << 20)), reader.shard_set)
    tokens_BL1 = there.read(2)[0].tokens_BL1
    copy = tmp_path / "copies" / shard.file.sha256
    sound = copy.read_bytes()
    damaged = bytearray(sound)
    damaged[shard.members.offset[0] + 20] ^= 1
    for data in (damaged, sound[:600]):
        copy.write_bytes(data)
        assert (there.read(2)[0].tokens_BL1 == tokens_BL1).all()
        assert copy.read_bytes() == sound


def test_a_member_that_is_not_as_listed_at_its_source_is_named_there(reader, web, tmp_path) -> None:
    shard = reader.shard_set.shards[1]
    members = shard.members.model_copy(update={"crc32": tuple(crc ^ 1 for crc in shard.members.crc32)})
    shards = (reader.shard_set.shards[0], shard.model_copy(update={"members": members}))
    wrong = reader.shard_set.model_copy(update={"shards": shards})
    there = ShardReader(place_of(web, DiskCache(tmp_path / "copies", 1 << 20)), wrong)
    with pytest.raises(CorruptError, match=f"{web}/{shard.file.path}, member .*: checksum mismatch"):
        there.read(2)


def test_a_shard_that_is_not_there_is_named(reader, web, tmp_path) -> None:
    path = tmp_path / "shards" / reader.shard_set.shards[1].file.path
    path.unlink()
    there = ShardReader(place_of(web, DiskCache(tmp_path / "copies", 1 << 20)), reader.shard_set)
    with pytest.raises(InputError, match=f"{web}/{path.name}: the shard is missing"):
        there.read(2)


def test_a_small_file_is_read_whole_or_is_none(web, reader, tmp_path) -> None:
    (tmp_path / "shards" / "manifest.json").write_text("{}")
    assert Remote(web).read("manifest.json") == b"{}"
    assert Remote(web).read("other.json") is None


def test_a_server_that_does_not_answer_is_named() -> None:
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/there/manifest.json: cannot be read; found .*; check"):
        Remote("http://127.0.0.1:9/there").read("manifest.json")


def test_urls_that_nothing_here_can_read_are_refused() -> None:
    with pytest.raises(InputError, match="nosuch://b: shards are not read from such a URL; found nosuch://, exp"):
        Remote("nosuch://b").read("manifest.json")
    if importlib.util.find_spec("adlfs") is None:
        with pytest.raises(MachineError, match="az://b: az:// cannot be read here"):
            Remote("az://b").read("manifest.json")
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(MachineError, match=f"gs://b: gs:// cannot be read here; .*; run {re.escape(adding('gs'))}"):
            Remote("gs://b").read("manifest.json")


@pytest.mark.parametrize(
    ("location", "expected"),
    [("s3://b/c", True), ("https://h/c", True), ("/a/b", False), ("a/b", False), (Path("s3://b"), False)],
)
def test_a_url_is_told_from_a_path(location: str | Path, expected: bool) -> None:
    assert is_url(location) is expected
