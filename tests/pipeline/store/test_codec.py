"""What every codec has in common; the targets of each are in test_sampled.py and test_topk.py.

Legend: B sequences, L targets a sequence, K ids kept a row, V vocabulary, n samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.pipeline.store import Block, Ranking, codec_for
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK, TOPK_CODECS, Codec
from capgap.schemas.errors import CapgapError, CorruptError, InputError
from capgap.schemas.records import SampledTargets, Sequences, TopkTargets

NAMES = [SEQUENCES, SAMPLED, *TOPK_CODECS.values()]
WITH_TARGETS = NAMES[1:]
# both sides of every change of width, and the largest that a run file may ask for
VOCAB_SIZES = st.sampled_from([1, 2, 255, 256, 257, 65535, 65536, 65537, 262144, 1 << 24])


@settings(max_examples=60)
@given(
    vocab_size=VOCAB_SIZES,
    num_sequences=st.integers(0, 4),
    length=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    ranked=st.booleans(),
)
def test_sequences_come_back_as_they_were(assert_same, vocab_size, num_sequences, length, seed, ranked) -> None:
    rng = np.random.default_rng(seed)
    shape = (num_sequences, length + 1)
    tokens_BL1 = rng.integers(0, vocab_size, shape, dtype=np.int32)
    if tokens_BL1.size:
        tokens_BL1[-1, -1] = vocab_size - 1
    block = Block(Sequences(tokens_BL1, rng.random(shape) < 0.3, rng.random(shape) < 0.6))
    ranking = Ranking(rng.permutation(vocab_size).astype(np.int32)) if ranked and vocab_size < 1 << 20 else None
    codec = Codec(SEQUENCES, length, vocab_size, ranking=ranking)
    assert_same(codec.decode(codec.encode(block.sequences), "here"), block)


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_tokens_come_back_as_they_were_beside_targets(codecs, make_block, assert_same, name: str) -> None:
    block = make_block(codecs[name])
    sequences, _ = codecs[name].decode(codecs[name].encode(block.sequences, block.targets), "here")
    assert_same((sequences, None), Block(block.sequences))


@pytest.mark.parametrize("name", NAMES)
def test_a_ranking_changes_the_bytes_and_nothing_that_is_read(codecs, make_block, stored, assert_same, name: str):
    block, codec = make_block(codecs[name]), codecs[name]
    ranked = dataclasses.replace(codec, ranking=Ranking(np.random.default_rng(0).permutation(300).astype(np.int32)))
    assert ranked.encode(block.sequences, block.targets) != codec.encode(block.sequences, block.targets)
    plain, found = stored(codec, block), stored(ranked, block)
    if name == SAMPLED:
        plain, found = _in_order_of_ids(plain), _in_order_of_ids(found)
    assert_same((found.sequences, found.targets), plain)


def _in_order_of_ids(block: Block) -> Block:
    row_D = np.repeat(np.arange(block.targets.num_ids_BL.size), block.targets.num_ids_BL.ravel())
    order_D = np.lexsort((block.targets.ids_D, row_D))
    changed = {name: getattr(block.targets, name)[order_D] for name in ("ids_D", "counts_D")}
    return Block(block.sequences, dataclasses.replace(block.targets, **changed))


@pytest.mark.parametrize(("vocab_size", "planes"), [(1, 1), (256, 1), (257, 2), (65536, 2), (65537, 3), (1 << 24, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_ids_take_as_many_planes_as_the_vocabulary_needs(make_block, name: str, vocab_size: int, planes: int) -> None:
    codec = Codec(name, 4, vocab_size, 1)
    block = make_block(Codec(name, 4, min(vocab_size, 300), 1), 2)
    data = codec.encode(block.sequences, block.targets if vocab_size > 1 else None) if vocab_size >= 300 else None
    if data is None:
        block = make_block(codec, 2)
        data = codec.encode(block.sequences, block.targets)
    names = pa.ipc.open_stream(zstandard.ZstdDecompressor().decompress(data)).schema.names
    for column in ("tokens", {SEQUENCES: "tokens", SAMPLED: "once"}.get(name, "ids")):
        assert [n for n in names if n.startswith(f"{column}_")] == [f"{column}_{i}" for i in range(planes)]


def _broken(array: np.ndarray, value: float) -> np.ndarray:
    copy = array.copy()
    copy.flat[copy.size // 2] = value
    return copy


@pytest.mark.parametrize("value", [-1, 300, 1 << 24, -(1 << 31)])
@pytest.mark.parametrize(
    ("name", "field"),
    [(SEQUENCES, "tokens_BL1"), (SAMPLED, "tokens_BL1"), (SAMPLED, "ids_D")]
    + [(name, "ids_BLK") for name in TOPK_CODECS.values()],
)
def test_an_id_outside_the_vocabulary_is_refused(codecs, make_block, name: str, field: str, value: int) -> None:
    block = make_block(codecs[name])
    with pytest.raises(InputError, match=rf"an id outside the vocabulary; found .*{value}.*expected 0 to 299"):
        codecs[name].encode(*_with(block, field, lambda array: _broken(array, value)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "field"),
    [(name, "label_logprobs_BL") for name in WITH_TARGETS]
    + [(name, field) for name in TOPK_CODECS.values() for field in ("logprobs_BLK", "tail_BL")],
)
def test_a_value_that_is_not_finite_is_refused(codecs, make_block, name: str, field: str, value: float) -> None:
    with pytest.raises(InputError, match=r"not finite; found 1 of"):
        codecs[name].encode(*_with(make_block(codecs[name]), field, lambda array: _broken(array, value)))


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_a_label_more_likely_than_certain_is_refused(codecs, make_block, name: str) -> None:
    with pytest.raises(InputError, match=r"label_logprobs_BL: a logprob above 0; found 0\.1"):
        codecs[name].encode(*_with(make_block(codecs[name]), "label_logprobs_BL", lambda a: _broken(a, 0.1)))


def test_an_unknown_codec_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"unknown codec; found sampled-planes-2, expected .*sampled-planes-1"):
        codec_for("sampled-planes-2", 8, {"vocab_size": 10, "num_ids": 1})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"vocab_size": 9},
        {"vocab_size": 9, "num_ids": "many"},
        {"vocab": 9, "n": 1},
        {"vocab_size": 9, "num_ids": 1, "ranking": "a"},
        {"vocab_size": 9, "num_ids": 1, "ranking": "a", "ranking_sha256": 7},
        {"vocab_size": 9, "num_ids": 1, "more": 1},
    ],
)
def test_a_codec_whose_settings_are_not_its_own_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=r"codec sampled-planes-1 has other settings; found .*expected numbers vocab_size"
    ):
        codec_for(SAMPLED, 8, settings)


@pytest.mark.parametrize(
    "heat",
    [
        {"temperature": 1.0},
        {"extra_temperatures": [2.0]},
        {"temperature": 1.0, "extra_temperatures": []},
        {"temperature": 1.0, "extra_temperatures": 2.0},
        {"temperature": 1.0, "extra_temperatures": [0]},
        {"temperature": "warm", "extra_temperatures": [2.0]},
    ],
)
def test_temperatures_that_are_none_are_refused(heat: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"codec topk-near-lossless-1 has other settings"):
        codec_for(TOPK, 8, {"vocab_size": 9, "num_ids": 1, **heat})
    with pytest.raises(InputError, match=r"codec sampled-planes-1 has other settings"):
        codec_for(SAMPLED, 8, {"vocab_size": 9, "num_ids": 1, "temperature": 1.0, "extra_temperatures": [2.0]})


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_is_rebuilt_from_what_the_manifest_says(codecs, name: str) -> None:
    assert codec_for(name, codecs[name].seq_len, codecs[name].settings) == codecs[name]
    ranking = Ranking(np.arange(300, dtype=np.int32)[::-1].copy())
    ranked = dataclasses.replace(codecs[name], ranking=ranking)
    files = {"ids-by-frequency.u32": ranking.data}
    assert codec_for(name, ranked.seq_len, ranked.settings, files.__getitem__) == ranked != codecs[name]


@pytest.mark.parametrize("name", NAMES)
def test_no_flipped_bit_changes_what_is_read(codecs, make_block, stored, assert_same, name: str) -> None:
    """A frame can say one content in several ways: a flip that only says it otherwise is left to the crc32."""
    block = make_block(codecs[name], 1)
    data = codecs[name].encode(block.sequences, block.targets)
    expected = stored(codecs[name], block)
    found = 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            decoded = codecs[name].decode(bytes(flipped), "here")
        except CorruptError:
            found += 1
        else:
            assert_same(decoded, expected)
    # measured: 98.8 % to 99.7 %
    assert found > 0.98 * 8 * len(data)


def _uncompressed(codec: Codec, block: Block) -> bytes:
    return zstandard.ZstdDecompressor().decompress(codec.encode(block.sequences, block.targets))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda raw, frame: frame + b"x", id="something behind the frame"),
        pytest.param(lambda raw, frame: frame + frame, id="two frames"),
        pytest.param(lambda raw, frame: frame[:-1], id="cut short"),
        pytest.param(lambda raw, frame: b"", id="empty"),
        pytest.param(lambda raw, frame: raw, id="not compressed"),
        pytest.param(lambda raw, frame: zstandard.compress(raw), id="no checksum"),
        pytest.param(lambda raw, frame: _frame(raw, write_content_size=False), id="no size"),
        pytest.param(lambda raw, frame: _frame(b""), id="nothing in the frame"),
        pytest.param(lambda raw, frame: _frame(raw[:-200]), id="half a stream"),
        pytest.param(lambda raw, frame: _frame(_schema_alone(raw)), id="a schema alone"),
        pytest.param(lambda raw, frame: _frame(b"\x00" * 5000), id="no stream"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_one_whole_member_is_refused(codecs, make_block, name: str, damage: Callable[..., bytes]) -> None:
    raw = _uncompressed(codecs[name], make_block(codecs[name]))
    with pytest.raises(CorruptError, match=f"the shard: the member cannot be decoded.*{name}"):
        codecs[name].decode(damage(raw, _frame(raw)), "the shard")


def _schema_alone(raw: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    pa.ipc.new_stream(sink, pa.ipc.open_stream(raw).schema).close()
    return sink.getvalue().to_pybytes()


def _frame(raw: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(raw)


@pytest.mark.parametrize("written", NAMES)
@pytest.mark.parametrize("read", WITH_TARGETS)
def test_a_member_of_another_codec_is_refused(codecs, make_block, written: str, read: str) -> None:
    if written == read:
        return
    block = make_block(codecs[written])
    with pytest.raises(CorruptError, match="cannot be decoded"):
        codecs[read].decode(codecs[written].encode(block.sequences, block.targets), "here")


@pytest.mark.parametrize("change", [{"seq_len": 11}, {"vocab_size": 200}, {"num_ids": 7}])
@pytest.mark.parametrize("name", WITH_TARGETS)
def test_a_member_that_contradicts_the_manifests_settings_is_refused(codecs, make_block, name: str, change) -> None:
    block = make_block(codecs[name])
    data = codecs[name].encode(block.sequences, block.targets)
    with pytest.raises(CorruptError, match="cannot be decoded"):
        dataclasses.replace(codecs[name], **change).decode(data, "here")


@pytest.mark.parametrize("name", NAMES)
def test_every_refusal_is_one_that_the_command_line_can_print(codecs, name: str) -> None:
    rng = np.random.default_rng(0)
    for size in range(0, 400, 7):
        with pytest.raises(CapgapError):
            codecs[name].decode(rng.bytes(size), "here")


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_a_column_of_any_other_content_is_refused_or_read_within_bounds(codecs, make_block, name: str) -> None:
    """Bytes at random where a column's bytes were: what a broken writer could leave, all checksums sound."""
    codec, rng = codecs[name], np.random.default_rng(3)
    raw = _uncompressed(codec, make_block(codec))
    batch = pa.ipc.open_stream(raw).read_next_batch()
    for column in batch.schema.names:
        for _ in range(8):
            content = bytearray(raw)
            values = batch[column].values.buffers()[1]
            place = raw.index(values.to_pybytes()) if values.size else 0
            content[place : place + values.size] = rng.bytes(values.size)
            try:
                sequences, targets = codec.decode(_frame(bytes(content)), "here")
            except CorruptError:
                continue
            assert sequences.tokens_BL1.min() >= 0 and sequences.tokens_BL1.max() < codec.vocab_size
            ids = targets.ids_D if name == SAMPLED else targets.ids_BLK
            assert ids.min() >= 0 and ids.max() < codec.vocab_size
            assert not np.isnan(targets.label_logprobs_BL).any()


def _with(block: Block, field: str, change: Callable[[np.ndarray], np.ndarray]):
    """The block's two records with one array changed."""
    records = []
    for record in (block.sequences, block.targets):
        if hasattr(record, field):
            record = dataclasses.replace(record, **{field: change(getattr(record, field))})
        records.append(record)
    return records


def test_the_default_of_topk_is_near_lossless() -> None:
    assert TOPK == "topk-near-lossless-1"


@pytest.mark.parametrize("top_k", [1, 8, 300])
@pytest.mark.parametrize("name", NAMES)
def test_no_member_takes_more_than_its_codec_says_a_sequence_takes(make_block, name: str, top_k: int) -> None:
    codec = Codec(name, 12, 300, 0 if name == SEQUENCES else top_k)
    block = make_block(codec, 40)
    if name in TOPK_CODECS.values():
        # logprobs this far apart take an escape each
        logprobs_BLK = block.targets.logprobs_BLK - 4 * np.arange(top_k, dtype=np.float32)
        label_logprobs_BL = block.targets.label_logprobs_BL - 4 * top_k
        block = Block(block.sequences, dataclasses.replace(block.targets, logprobs_BLK=logprobs_BLK))
        block = Block(block.sequences, dataclasses.replace(block.targets, label_logprobs_BL=label_logprobs_BL))
    of_one, of_all = (
        zstandard.get_frame_parameters(codec.encode(some.sequences, some.targets)).content_size
        for some in (_first(block), block)
    )
    # the schema and the padding of columns are the same in both
    assert of_all - of_one <= 39 * codec.sequence_bytes + 64 * 20


def _first(block: Block) -> Block:
    targets = block.targets
    if isinstance(targets, SampledTargets):
        count = int(targets.num_ids_BL[0].sum())
        targets = SampledTargets(
            targets.num_ids_BL[:1], targets.ids_D[:count], targets.counts_D[:count], targets.label_logprobs_BL[:1]
        )
    elif targets is not None:
        targets = TopkTargets(*(array[:1] for array in vars(targets).values()))
    return Block(block.sequences.part(slice(1)), targets)


@pytest.mark.parametrize(
    ("name", "seq_len", "num_ids"),
    [(TOPK_CODECS["lossless"], 131072, 1200), (TOPK, 131072, 1700), (SAMPLED, 131072, 1100)],
)
def test_a_member_that_no_reader_would_accept_is_refused_before_it_is_encoded(name, seq_len, num_ids) -> None:
    codec = Codec(name, seq_len, 128_000, num_ids)
    tokens_BL1 = np.zeros((1, seq_len + 1), np.int32)
    with pytest.raises(InputError, match=rf"a member of codec {name} may be larger .* expected at most 1,073,741,824"):
        codec.encode(Sequences(tokens_BL1, tokens_BL1 > 0, tokens_BL1 > 0))
