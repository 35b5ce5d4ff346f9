"""Damage to a finished folder, byte by byte."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.folder import content_files, finish
from capgap.pipeline.stage.identity import content_of
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.verify.verify import verify
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import CapgapError, CorruptError, InputError
from capgap.schemas.manifest import MANIFEST_NAME, FileEntry, Manifest

FLIPS = 60


@pytest.fixture
def folder(make_corpus_run, tmp_path: Path) -> Path:
    carry_out(make_corpus_run(), Instance("corpus"))
    return tmp_path / "out" / "corpus"


def _flips(path: Path, places: list[int], seed: int) -> Iterator[int]:
    """Flip one bit at each place in turn, and put it back."""
    bits = np.random.default_rng(seed).integers(0, 8, len(places))
    with path.open("r+b", buffering=0) as file:
        for place, bit in zip(places, bits, strict=True):
            file.seek(place)
            (value,) = file.read(1)
            file.seek(place)
            file.write(bytes([value ^ 1 << int(bit)]))
            yield place
            file.seek(place)
            file.write(bytes([value]))


def test_a_sound_folder_is_one_line_with_its_counts(folder: Path) -> None:
    manifest = read_manifest(folder)
    num_members = sum(len(shard.members) for s in manifest.shard_sets.values() for shard in s.shards)
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name[-5:] != ".json")
    num_bytes += sum(path.stat().st_size for path in (folder / "tokenizer").iterdir())
    (line,) = verify(folder)
    counts = f"{len(manifest.files)} files, {num_members} members, {num_bytes:,} bytes"
    assert line == f"corpus: {counts}, {len(manifest.sources)} sources: sound"


def test_a_flipped_bit_anywhere_in_a_listed_file_is_found(folder: Path) -> None:
    for number, file in enumerate(read_manifest(folder).files):
        path = folder / file.path
        places = np.random.default_rng([7, number]).integers(0, file.num_bytes, FLIPS).tolist()
        # headers and the zeros at a shard's end, which no reader of members looks at, among them
        places += [0, 257, file.num_bytes - 1, file.num_bytes - 600] if path.suffix == ".tar" else []
        for place in _flips(path, places, number):
            with pytest.raises(CorruptError) as caught:
                list(verify(folder))
            assert str(caught.value).startswith(f"{path}: the file is not what it was; found sha256 "), place
    assert len(list(verify(folder))) == 1


def test_the_message_says_how_to_make_the_stage_again(folder: Path) -> None:
    (folder / "student-000000.tar").write_bytes(b"")
    with pytest.raises(
        CorruptError, match=r"found sha256 e3b0c44298fc, 0 bytes, .* rerun it with `capgap run RUN.yaml --"
    ):
        list(verify(folder))


def test_a_source_that_was_edited_or_is_gone_is_said_and_one_that_rotted_is_refused(folder: Path) -> None:
    edited, gone, rotten = (Path(source.path) for source in read_manifest(folder).sources[:3])
    edited.write_text("written anew")
    gone.unlink()
    lines = list(verify(folder))
    assert lines[0].endswith(" sources: sound") and lines[1:] == [
        f"  source {edited} was changed after the corpus stage had read it",
        f"  source {gone} is gone: it was not compared",
    ]
    before = rotten.stat()
    rotten.write_bytes(rotten.read_bytes()[:-1] + b"?")
    os.utime(rotten, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CorruptError, match=f"{rotten}: the source is not what it was; found .* fetch the file again"):
        list(verify(folder))


@pytest.mark.parametrize("name", ["student-000000.tar", "tokenizer/tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CorruptError, match=f"{folder / name}: the file is gone; rerun it with"):
        list(verify(folder))


def test_a_flipped_bit_anywhere_in_what_the_manifest_says_is_found(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    text = path.read_text()
    # between values there is only white space, whose change says nothing else
    said = [place for match in re.finditer(r"[^\s{}\[\],:]+", text) for place in range(*match.span())]
    assert len(said) > 2000
    places = np.random.default_rng(0).choice(said, 4 * FLIPS, replace=False).tolist()
    for place in _flips(path, places, 0):
        with pytest.raises(CapgapError):
            list(verify(folder))
            pytest.fail(f"not found: {text[place - 20 : place + 20]!r}")


def test_an_edited_manifest_is_named(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    manifest = read_manifest(folder)
    path.write_text(manifest.model_copy(update={"totals": {}}).model_dump_json())
    with pytest.raises(CorruptError, match=f"{path}: the manifest is not what was written"):
        list(verify(folder))


def _edited(folder: Path, **update: object) -> None:
    manifest = read_manifest(folder)
    finish(folder, manifest.model_copy(update=update))


def test_a_manifest_that_cannot_be_read_is_refused(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptError, match=f"{path}: the manifest cannot be understood"):
        list(verify(folder))


def test_a_list_of_files_that_was_edited_is_refused(folder: Path) -> None:
    files = read_manifest(folder).files
    _edited(folder, files=files[1:])
    with pytest.raises(CorruptError, match="the manifest's list of files contradicts its own digest"):
        list(verify(folder))


def test_another_size_than_the_manifest_says_is_refused(folder: Path) -> None:
    files = read_manifest(folder).files
    larger = FileEntry(path=files[0].path, sha256=files[0].sha256, num_bytes=files[0].num_bytes + 1)
    _edited(folder, files=(larger, *files[1:]))
    with pytest.raises(CorruptError, match=f"{files[0].path}: the file is not what it was"):
        list(verify(folder))


def test_a_shard_that_counts_other_sequences_than_its_members_is_refused(folder: Path) -> None:
    sets = read_manifest(folder).shard_sets
    shard = sets["student"].shards[0]
    wrong = shard.model_copy(update={"num_sequences": shard.num_sequences + 1})
    student = sets["student"].model_copy(update={"shards": (wrong, *sets["student"].shards[1:])})
    _edited(folder, shard_sets={**sets, "student": student})
    with pytest.raises(CorruptError, match=r"the manifest contradicts itself; found shard student-000000.tar"):
        list(verify(folder))


def test_a_member_that_cannot_be_read_is_refused_though_every_digest_of_files_holds(folder: Path) -> None:
    """As if the shard had been written wrongly in the first place: the manifest is made to fit the damage."""
    manifest = read_manifest(folder)
    path = folder / "student-000000.tar"
    data = bytearray(path.read_bytes())
    data[manifest.shard_sets["student"].shards[0].member(0).offset + 40] ^= 1
    path.write_bytes(data)
    _accept_as_it_is(folder, manifest)
    with pytest.raises(CorruptError, match="member student-000000-0000 at byte 512: checksum mismatch"):
        list(verify(folder))


def _accept_as_it_is(folder: Path, manifest: Manifest) -> None:
    files = content_files(folder)
    entries = {file.path: file for file in files}
    values = json.loads(manifest.model_dump_json())
    for shard_set in values["shard_sets"].values():
        for shard in shard_set["shards"]:
            shard["file"] = entries[shard["file"]["path"]].model_dump()
    values |= {"files": [file.model_dump() for file in files], "content": content_of(files, manifest.sources)}
    finish(folder, Manifest.model_validate(values))


def test_every_finished_stage_below_a_folder_is_checked(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "out" / "other" / "corpus")
    assert len(list(verify(tmp_path / "out"))) == 2
    (tmp_path / "out" / "other" / "corpus" / "heldout-000000.tar").write_bytes(b"")
    lines = verify(tmp_path / "out")
    assert next(lines).startswith("corpus: ")
    with pytest.raises(CorruptError, match=r"other/corpus/heldout-000000.tar"):
        next(lines)


def test_a_folder_without_a_finished_stage_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "work.json").write_text("{}")
    with pytest.raises(
        InputError, match=f"{tmp_path}: no finished stage; found no manifest.json, expected at least one"
    ):
        list(verify(tmp_path))
