"""Shards and manifests with anything in them: an error with a name, in little time and memory, and never another one.

hypothesis spoils real members in ways that a checksum cannot see, because it is made anew after the spoiling.
`CAPGAP_FUZZ` says how many examples there are of each kind.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_limits import bounded_memory

from capgap.pipeline.stage.manifests import read_manifest, require_seal
from capgap.pipeline.store import Block, Codec, ShardReader, ShardWriter, rank_ids
from capgap.pipeline.store.codec import CHUNKS, SAMPLED, SEQUENCES, TOPK_CODECS
from capgap.pipeline.store.ranking import RANKING_NAME
from capgap.schemas.errors import CapgapError
from capgap.schemas.manifest import MANIFEST_NAME, ShardSet
from capgap.schemas.records import ChunkTargets, ProjectedTargets, SampledTargets, Sequences, Targets, TopkTargets

EXAMPLES = int(os.environ.get("CAPGAP_FUZZ", "120"))
NAMES = [SEQUENCES, SAMPLED, CHUNKS, *TOPK_CODECS.values()]
VOCAB, LENGTH, IDS, ROWS = 300, 16, 4, 3
# Above what a process of tests has before: a length that is believed asks for far more.
MORE_BYTES = 2 << 30

FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize="CAPGAP_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    with bounded_memory(MORE_BYTES):
        yield


@cache
def shard_of(name: str, folder: Path) -> tuple[ShardSet, bytes, bytes]:
    """A real shard: its description, its bytes, and its only member's Arrow stream."""
    rng = np.random.default_rng(3)
    tokens_BL1 = rng.integers(0, VOCAB, (ROWS, LENGTH + 1), dtype=np.int32)
    sequences = Sequences(tokens_BL1, np.zeros_like(tokens_BL1, bool), np.ones_like(tokens_BL1, bool))
    sequences.mask_BL1[:, 0] = False
    ranking = rank_ids([sequences], VOCAB)
    (folder / RANKING_NAME).write_bytes(ranking.data)
    codec = Codec(name, LENGTH, VOCAB, 0 if name == SEQUENCES else IDS, None if name == SEQUENCES else ranking)
    stem = name.replace("-", "")
    writer = ShardWriter(folder, folder / "sidecars", stem, codec)
    entry = writer.write(0, [Block(sequences, targets_of(name, tokens_BL1[:, 1:]))])
    data = (folder / f"{stem}-000000.tar").read_bytes()
    member = entry.member(0)
    stored = data[member.offset : member.offset + member.num_bytes]
    return writer.shard_set([entry]), data, zstandard.ZstdDecompressor().decompress(stored)


def targets_of(name: str, labels_BL: Any) -> Targets | None:
    """The label takes 40 % of each row, three other ids most of the rest."""
    if name == SEQUENCES:
        return None
    others_BLK = (labels_BL[..., None] + np.arange(IDS)) % VOCAB
    half_BL = np.full(labels_BL.shape, np.log(0.4), np.float32)
    if name == SAMPLED:
        num_BL = np.full(labels_BL.shape, 3, np.int32)
        counts_D = np.tile(np.array([2, 1, 1], np.int32), labels_BL.size)
        return SampledTargets(num_BL, others_BLK[..., :3].reshape(-1).astype(np.int32), counts_D, half_BL)
    if name == CHUNKS:
        all_BL, three_BL = np.ones_like(labels_BL, bool), np.full(labels_BL.shape, 3, np.int32)
        logprobs_D = np.tile(np.log(np.array([0.4, 0.3, 0.2], np.float32)), labels_BL.size)
        ids_D, tail_BL = others_BLK[..., :3].reshape(-1).astype(np.int32), np.full(labels_BL.shape, 0.1, np.float32)
        return ChunkTargets(all_BL, all_BL, half_BL, ProjectedTargets(three_BL, ids_D, logprobs_D, tail_BL))
    logprobs_BLK = np.broadcast_to(np.log(np.array([0.4, 0.3, 0.2, 0.05], np.float32)), others_BLK.shape)
    tail_BL, none_BLT = np.full(labels_BL.shape, 0.05, np.float32), np.zeros((*labels_BL.shape, 0), np.float32)
    return TopkTargets(others_BLK.astype(np.int32), np.ascontiguousarray(logprobs_BLK), tail_BL, half_BL, none_BLT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def read_all(folder: Path, shard_set: ShardSet) -> None:
    """Both ways of reading; only an error with a name may come out."""
    with contextlib.suppress(CapgapError):
        reader = ShardReader(folder, shard_set)
        with contextlib.suppress(CapgapError):
            reader.read_member(0, 0)
        reader.read_stored(0, 0)


Edits = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["flip", "set", "word", "cut", "insert", "double"]),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=6,
)


def edited(data: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    spoilt = bytearray(data)
    for where, kind, value in edits:
        place = int(where * len(spoilt))
        if kind == "flip" and spoilt:
            spoilt[place] ^= value[0] or 1
        elif kind == "set":
            spoilt[place : place + len(value)] = value
        elif kind == "word":
            place -= place % 8
            spoilt[place : place + 8] = int.from_bytes(value, "little").to_bytes(12, "little")[:8]
        elif kind == "cut":
            del spoilt[place : place + value[0]]
        elif kind == "insert":
            spoilt[place:place] = value
        else:
            spoilt += spoilt[place : place + 4096]
    return bytes(spoilt)


def test_the_shards_are_sound(folder: Path) -> None:
    for name in NAMES:
        shard_set, _, _ = shard_of(name, folder)
        reader = ShardReader(folder, shard_set)
        assert len(reader.read_member(0, 0)[0]) == ROWS
        # chunks are decoded on the host alone
        assert name == CHUNKS or len(reader.read_stored(0, 0)) == ROWS


@FUZZ
@given(name=st.sampled_from(NAMES), edits=Edits)
def test_a_shard_with_anything_in_it_raises_errors_with_names_only(folder: Path, name: str, edits: Any) -> None:
    shard_set, data, _ = shard_of(name, folder)
    path = folder / shard_set.shards[0].file.path
    try:
        path.write_bytes(edited(data, edits))
        read_all(folder, shard_set)
    finally:
        path.write_bytes(data)


@FUZZ
@given(name=st.sampled_from(NAMES), edits=Edits, inside=st.booleans())
def test_a_member_with_anything_in_it_and_checksums_that_agree(
    folder: Path, name: str, edits: Any, inside: bool
) -> None:
    shard_set, data, content = shard_of(name, folder)
    shard = shard_set.shards[0]
    if inside:
        member = zstandard.ZstdCompressor(write_checksum=True).compress(edited(content, edits))
    else:
        place = shard.member(0)
        member = edited(data[place.offset : place.offset + place.num_bytes], edits)
    path = folder / shard.file.path
    spoilt = bytes(512) + member + bytes(-len(member) % 512 + 1024)
    members = shard.members.model_copy(
        update={"offset": (512,), "num_bytes": (len(member),), "crc32": (zlib.crc32(member),)}
    )
    file = shard.file.model_copy(update={"num_bytes": len(spoilt)})
    altered = shard.model_copy(update={"members": members, "file": file})
    try:
        path.write_bytes(spoilt)
        read_all(folder, shard_set.model_copy(update={"shards": (altered,)}))
    finally:
        path.write_bytes(data)


Scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.sampled_from(
        ["", "..", "/", "a", "\0", "NaN", "topk-compact-1", "sampled-planes-1", "sequences-planes-1", "chunks-1"]
    ),
)
Json = st.recursive(Scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def places_in(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places_in(inner, (*path, key))


@FUZZ
@given(data=st.data())
def test_a_manifest_with_anything_in_it_raises_errors_with_names_only(made: Path, tmp_path: Path, data: Any) -> None:
    value = json.loads((made / "cache" / MANIFEST_NAME).read_text())
    every = list(places_in(value))[1:]
    for _ in range(data.draw(st.integers(1, 3))):
        *outer, last = data.draw(st.sampled_from(every))
        inner = value
        try:
            for key in outer:
                inner = inner[key]
            inner[last] = data.draw(Json)
        except (KeyError, IndexError, TypeError):
            continue  # within what was replaced before
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(value))
    with contextlib.suppress(CapgapError):
        manifest = read_manifest(tmp_path)
        assert manifest is not None
        for shard_set in manifest.shard_sets.values():
            read_all(made / "cache", shard_set)
        require_seal(tmp_path, manifest)


@FUZZ
@given(edits=Edits)
def test_a_manifest_of_spoilt_bytes_raises_errors_with_names_only(made: Path, tmp_path: Path, edits: Any) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(edited((made / "cache" / MANIFEST_NAME).read_bytes(), edits))
    with contextlib.suppress(CapgapError):
        manifest = read_manifest(tmp_path)
        assert manifest is not None
        require_seal(tmp_path, manifest)
