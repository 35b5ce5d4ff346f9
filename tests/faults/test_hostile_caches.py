"""A cache from a stranger: whatever it claims, it is read within bounds or refused, and nothing of it runs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard

from capgap.pipeline.stage.folder import content_files, finish
from capgap.pipeline.stage.identity import content_of
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import ShardReader
from capgap.pipeline.verify.verify import verify
from capgap.schemas.errors import CapgapError, CorruptError, InputError
from capgap.schemas.manifest import Manifest, Members, ShardEntry

NAME = "sampled-000000.tar"
KEY = "sampled-000000-0000"


@pytest.fixture
def cache(copy: Path) -> Path:
    return copy / "cache"


def first_of(cache: Path) -> tuple[Manifest, ShardEntry]:
    manifest = read_manifest(cache)
    assert manifest is not None
    return manifest, manifest.shard_sets["sampled"].shards[0]


def seal(cache: Path, manifest: Manifest, shard: ShardEntry | None = None, **update: Any) -> Manifest:
    """Make every digest agree with what lies there now, as a stranger would."""
    files = content_files(cache)
    whole = manifest.shard_sets["sampled"]
    if shard is not None:
        entry = next(file for file in files if file.path == NAME)
        shards = (shard.model_copy(update={"file": entry}), *whole.shards[1:])
        update["shard_sets"] = {"sampled": whole.model_copy(update={"shards": shards})}
    made = manifest.model_copy(update={"files": files, "content": content_of(files, manifest.sources), **update})
    return finish(cache, made)


def with_member(cache: Path, data: bytes) -> Manifest:
    """The first shard holds this as its only member, and all checksums agree."""
    manifest, shard = first_of(cache)
    with tarfile.open(cache / NAME, "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo(f"{KEY}.arrow.zst")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    members = Members(
        offset=(512,), num_bytes=(len(data),), num_sequences=(shard.num_sequences,), crc32=(zlib.crc32(data),)
    )
    return seal(cache, manifest, shard.model_copy(update={"members": members}))


def refused(cache: Path, manifest: Manifest) -> str:
    """What the reader says of the first member; it takes little memory over it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CapgapError) as caught:
        ShardReader(cache, manifest.shard_sets["sampled"]).read_member(0, 0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB: a bomb here takes gigabytes
    with pytest.raises(CapgapError):
        list(verify(cache))
    return str(caught.value)


def frame(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def stream(batch: pa.RecordBatch, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def original(cache: Path) -> bytes:
    """The Arrow stream of the first member."""
    _, shard = first_of(cache)
    member = shard.member(0)
    data = (cache / NAME).read_bytes()[member.offset : member.offset + member.num_bytes]
    return zstandard.ZstdDecompressor().decompress(data)


def test_a_member_put_there_by_hand_is_read(cache: Path) -> None:
    manifest = with_member(cache, frame(original(cache)))
    assert len(ShardReader(cache, manifest.shard_sets["sampled"]).read_member(0, 0)[0]) == 8
    assert list(verify(cache))


def test_a_frame_that_inflates_to_gigabytes_is_refused_by_what_the_manifest_says(cache: Path) -> None:
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj(size=900 << 20)
    bomb = b"".join(compressor.compress(bytes(10 << 20)) for _ in range(90)) + compressor.flush()
    assert len(bomb) < 1 << 20
    assert "a frame of 943718400 bytes, expected at most" in refused(cache, with_member(cache, bomb))


@pytest.mark.parametrize("size", [1 << 40, (1 << 64) - 3])
def test_a_frame_that_claims_terabytes_is_refused(cache: Path, size: int) -> None:
    # magic, a descriptor with an 8-byte content size, one segment, a checksum
    claimed = b"\x28\xb5\x2f\xfd" + b"\xe4" + size.to_bytes(8, "little") + b"\x01\x00\x00" + b"\0\0\0\0"
    assert f"a frame of {size} bytes" in refused(cache, with_member(cache, claimed))


def test_a_frame_without_size_or_checksum_is_refused(cache: Path) -> None:
    content = original(cache)
    no_size = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(content)
    assert "expected at most" in refused(cache, with_member(cache, no_size))
    no_checksum = zstandard.ZstdCompressor(write_checksum=False).compress(content)
    assert "a frame without a checksum" in refused(cache, with_member(cache, no_checksum))


@pytest.mark.parametrize("kind", ["zstd", "lz4"])
def test_a_batch_compressed_within_the_frame_is_refused(cache: Path, kind: str) -> None:
    batch = pa.ipc.open_stream(original(cache)).read_next_batch()
    data = frame(stream(batch, compression=kind))
    assert "a record batch that is compressed within the frame" in refused(cache, with_member(cache, data))


@pytest.mark.parametrize("claim", [1 << 40, (1 << 62), -1])
def test_arrow_metadata_that_claims_terabytes_is_refused(cache: Path, claim: int) -> None:
    content = bytearray(original(cache))
    rows = (8).to_bytes(8, "little", signed=True)
    places = [i for i in range(0, len(content) - 8) if content[i : i + 8] == rows and i % 8 == 0]
    assert places, "the number of rows stands in the metadata"
    # each of the lengths that the metadata holds, one at a time
    for place in places[:24]:
        spoilt = bytearray(content)
        spoilt[place : place + 8] = claim.to_bytes(8, "little", signed=True)
        manifest = with_member(cache, frame(bytes(spoilt)))
        try:
            ShardReader(cache, manifest.shard_sets["sampled"]).read_member(0, 0)
        except CorruptError:
            continue
        pytest.fail(f"a length of {claim} at byte {place} was believed")


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_in_arrow_metadata_is_not_opened(cache: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    payload = pickle.dumps(_Payload(marker))
    names = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
    batch = pa.ipc.open_stream(original(cache)).read_next_batch()
    schema = pa.schema([field.with_metadata(names) for field in batch.schema], metadata={b"pandas": payload})
    with_extension = pa.RecordBatch.from_arrays(batch.columns, schema=schema)
    manifest = with_member(cache, frame(stream(with_extension)))
    with contextlib.suppress(CapgapError):
        ShardReader(cache, manifest.shard_sets["sampled"]).read_member(0, 0)
    assert not marker.exists()
    pickle.loads(payload)  # the payload would work
    assert marker.exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("/etc/cron.d/evil", tarfile.REGTYPE),
        ("../../evil", tarfile.REGTYPE),
        (f"{KEY}/../../evil", tarfile.REGTYPE),
        (f"{KEY}.pyd", tarfile.REGTYPE),
        (f"{KEY}.arrow.zst", tarfile.SYMTYPE),
        (f"{KEY}.arrow.zst", tarfile.LNKTYPE),
        (f"{KEY}.arrow.zst", tarfile.CHRTYPE),
        (f"{KEY}.arrow.zst", tarfile.BLKTYPE),
        (f"{KEY}.arrow.zst", tarfile.FIFOTYPE),
        (f"{KEY}.arrow.zst", tarfile.DIRTYPE),
        (f"{KEY}.arrow.zst", tarfile.GNUTYPE_SPARSE),
        (f"{KEY}.arrow.zst", tarfile.XHDTYPE),
    ],
)
def test_a_tar_member_that_is_no_plain_file_of_its_name_is_refused(cache: Path, name: str, kind: bytes) -> None:
    manifest, shard = first_of(cache)
    data = bytearray((cache / NAME).read_bytes())
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = shard.members.num_bytes[0], kind, "/etc/passwd"
    data[:512] = info.tobuf(tarfile.USTAR_FORMAT)[:512]
    (cache / NAME).write_bytes(data)
    seal(cache, manifest, shard)
    with pytest.raises(CorruptError, match=f"{NAME}, member {KEY} at byte 0: another tar member than the manifest"):
        list(verify(cache))


def test_a_tar_member_that_no_manifest_lists_is_refused(cache: Path) -> None:
    manifest, shard = first_of(cache)
    with tarfile.open(cache / NAME, "a") as tar:
        tar.addfile(tarfile.TarInfo("../evil.pyd"), io.BytesIO())
    seal(cache, manifest, shard)
    with pytest.raises(CorruptError, match="bytes after the last member that the manifest lists"):
        list(verify(cache))


@pytest.mark.parametrize("path", ["/etc/passwd", "../teacher/manifest.json", "a/../../b", "", ".", "a\\..\\b", "a\0b"])
def test_a_manifest_names_nothing_outside_its_folder(cache: Path, path: str) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    for place in (manifest["files"][0], manifest["shard_sets"]["sampled"]["shards"][0]["file"]):
        kept, place["path"] = place["path"], path
        (cache / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CorruptError, match="expected one inside the folder"):
            read_manifest(cache)
        place["path"] = kept


@pytest.mark.parametrize("ranking", ["../corpus/manifest.json", "/dev/zero", "/etc/passwd"])
def test_a_ranking_is_a_file_of_the_folder(cache: Path, ranking: str) -> None:
    manifest, _ = first_of(cache)
    whole = manifest.shard_sets["sampled"]
    settings = whole.codec_settings | {"ranking": ranking}
    with pytest.raises(InputError, match="has other settings"):
        ShardReader(cache, whole.model_copy(update={"codec_settings": settings}))


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 1 << 40), ("vocab_size", 0), ("num_ids", 1 << 40)])
def test_a_codec_s_numbers_are_bounded(cache: Path, name: str, value: int) -> None:
    manifest, _ = first_of(cache)
    whole = manifest.shard_sets["sampled"]
    with pytest.raises(InputError, match="has other settings"):
        ShardReader(cache, whole.model_copy(update={"codec_settings": whole.codec_settings | {name: value}}))


@pytest.mark.parametrize("name", ["offset", "num_bytes", "num_sequences", "crc32"])
@pytest.mark.parametrize("value", [-1, 1 << 40, 1 << 60, 10**30])
def test_a_member_s_numbers_are_bounded(cache: Path, name: str, value: int) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    shard = manifest["shard_sets"]["sampled"]["shards"][0]
    shard["members"][name] = [value]
    shard["num_sequences"] = shard["members"]["num_sequences"][0]
    (cache / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CapgapError):
        found = read_manifest(cache)
        assert found is not None
        ShardReader(cache, found.shard_sets["sampled"]).read_member(0, 0)


def test_a_manifest_of_gigabytes_is_refused_before_it_is_read(cache: Path) -> None:
    os.truncate(cache / "manifest.json", 8 << 30)  # a hole: no disk is used
    with pytest.raises(InputError, match=r"manifest\.json: larger than any manifest"):
        read_manifest(cache)


@pytest.mark.parametrize("name", [NAME, "manifest.json", "ids-by-frequency.u32"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_never_read(cache: Path, name: str, kind: str) -> None:
    manifest, _ = first_of(cache)
    (cache / name).unlink()
    make: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "folder": Path.mkdir,
    }
    make[kind](cache / name)
    with pytest.raises(CapgapError):
        list(verify(cache))
    if name == "manifest.json":
        assert read_manifest(cache) is None
    else:
        with pytest.raises(InputError, match="missing"):
            ShardReader(cache, manifest.shard_sets["sampled"]).read_member(0, 0)


def test_a_second_teacher_that_the_cache_names_runs_no_code(cache: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    teacher = tmp_path / "evil"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    (teacher / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    capgap = Path(sys.executable).with_name("capgap")
    done = subprocess.run(
        [capgap, "verify", cache, "--rescore", "0.1", "--teacher", teacher, "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "needs Python code that comes with it, which is not run" in done.stderr
    assert not marker.exists()
