"""Legend: B sequences, L targets a sequence, K ids kept a row, V vocabulary, n draws."""

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

from capgap.pipeline.store import Block, codec_for
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK, Codec
from capgap.schemas.errors import CapgapError, CorruptError, InputError
from capgap.schemas.records import SampledTargets, Sequences, TopkTargets

SIZES = {"num_sequences": st.integers(0, 4), "length": st.integers(1, 20), "seed": st.integers(0, 2**32)}
# both sides of every change of width, and the largest that a run file may ask for
VOCAB_SIZES = st.sampled_from([1, 2, 255, 256, 257, 65535, 65536, 65537, 262144, 1 << 24])
NUM_DRAWS = st.sampled_from([1, 2, 50, 255, 256, 65535])


def _sequences(rng: np.random.Generator, num_sequences: int, length: int, vocab_size: int) -> Sequences:
    shape = (num_sequences, length + 1)
    tokens_BL1 = rng.integers(0, vocab_size, shape, dtype=np.int32)
    if tokens_BL1.size:
        tokens_BL1[-1, -1] = vocab_size - 1
    return Sequences(tokens_BL1, rng.random(shape) < 0.3, rng.random(shape) < 0.6)


def _sampled(rng: np.random.Generator, num_sequences: int, length: int, vocab_size: int, num_draws: int):
    rows = []
    for _ in range(num_sequences * length):
        num_ids = int(rng.integers(1, min(num_draws, vocab_size, 40) + 1))
        ids = np.sort(rng.choice(vocab_size, num_ids, replace=False))
        cuts = np.sort(rng.choice(num_draws - 1, num_ids - 1, replace=False)) + 1 if num_ids > 1 else []
        rows.append((ids, np.diff([0, *cuts, num_draws])))
    nothing = np.zeros(0, np.int32)
    return SampledTargets(
        np.array([len(ids) for ids, _ in rows], np.int32).reshape(num_sequences, length),
        np.concatenate([nothing, *(ids for ids, _ in rows)]).astype(np.int32),
        np.concatenate([nothing, *(counts for _, counts in rows)]).astype(np.int32),
        -rng.exponential(5, (num_sequences, length)).astype(np.float32),
    )


@settings(deadline=None, max_examples=60)
@given(vocab_size=VOCAB_SIZES, **SIZES)
def test_sequences_come_back_as_they_were(assert_same, vocab_size, num_sequences, length, seed) -> None:
    block = Block(_sequences(np.random.default_rng(seed), num_sequences, length, vocab_size))
    codec = Codec(SEQUENCES, length, vocab_size)
    assert_same(codec.decode(codec.encode(block.sequences), "here"), block)


@settings(deadline=None, max_examples=100)
@given(vocab_size=VOCAB_SIZES, num_draws=NUM_DRAWS, **SIZES)
def test_sampled_targets_come_back_as_they_were(
    assert_same, vocab_size, num_draws, num_sequences, length, seed
) -> None:
    rng = np.random.default_rng(seed)
    sequences = _sequences(rng, num_sequences, length, vocab_size)
    block = Block(sequences, _sampled(rng, num_sequences, length, vocab_size, num_draws))
    codec = Codec(SAMPLED, length, vocab_size, num_draws)
    assert_same(codec.decode(codec.encode(block.sequences, block.targets), "here"), block)


@settings(deadline=None, max_examples=100)
@given(
    vocab_size=VOCAB_SIZES,
    num_kept=st.integers(1, 9),
    tail=st.sampled_from([0.0, 1e-9, 1e-38, 0.25, 1.0]),
    ties=st.booleans(),
    **SIZES,
)
def test_topk_targets_come_back_as_they_were(
    assert_same, vocab_size, num_kept, tail, ties, num_sequences, length, seed
) -> None:
    rng = np.random.default_rng(seed)
    num_kept, rows = min(num_kept, vocab_size), num_sequences * length
    ids_NK = [rng.choice(vocab_size, num_kept, replace=False) for _ in range(rows)]
    shape = (num_sequences, length, num_kept)
    logprobs_BLK = -np.sort(rng.exponential(3, shape), axis=2)
    targets = TopkTargets(
        np.array(ids_NK, np.int32).reshape(shape),
        np.full(shape, -1.25, np.float32) if ties else logprobs_BLK.astype(np.float32),
        np.full(shape[:2], tail, np.float32),
        -rng.exponential(5, shape[:2]).astype(np.float32),
    )
    block = Block(_sequences(rng, num_sequences, length, vocab_size), targets)
    codec = Codec(TOPK, length, vocab_size, num_kept)
    assert_same(codec.decode(codec.encode(block.sequences, block.targets), "here"), block)


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [(256, pa.uint8()), (257, pa.uint16()), (65536, pa.uint16()), (65537, pa.uint32()), (1 << 24, pa.uint32())],
)
@pytest.mark.parametrize("name", [SEQUENCES, SAMPLED, TOPK])
def test_ids_take_the_narrowest_type_that_holds_the_vocabulary(name: str, vocab_size: int, expected: pa.DataType):
    rng = np.random.default_rng(0)
    codec = Codec(name, 4, vocab_size, 3)
    topk = TopkTargets(np.zeros((2, 4, 3), np.int32), *(np.zeros(s, np.float32) for s in ((2, 4, 3), (2, 4), (2, 4))))
    targets = {SEQUENCES: None, SAMPLED: _sampled(rng, 2, 4, vocab_size, 3), TOPK: topk}[name]
    data = codec.encode(_sequences(rng, 2, 4, vocab_size), targets)
    schema = pa.ipc.open_stream(zstandard.ZstdDecompressor().decompress(data)).schema
    columns = {"tokens"} if targets is None else {"tokens", "ids"}
    assert {column: schema.field(column).type.value_type for column in columns} == dict.fromkeys(columns, expected)


def _broken(array: np.ndarray, value: float) -> np.ndarray:
    copy = array.copy()
    copy.flat[copy.size // 2] = value
    return copy


@pytest.mark.parametrize("value", [-1, 300, 1 << 24, -(1 << 31)])
@pytest.mark.parametrize(
    ("name", "field"), [(SEQUENCES, "tokens_BL1"), (SAMPLED, "tokens_BL1"), (SAMPLED, "ids_D"), (TOPK, "ids_BLK")]
)
def test_an_id_outside_the_vocabulary_is_refused(codecs, make_block, name: str, field: str, value: int) -> None:
    block = make_block(codecs[name])
    with pytest.raises(InputError, match=rf"an id outside the vocabulary; found .*{value}.*expected 0 to 299"):
        codecs[name].encode(*_with(block, field, lambda array: _broken(array, value)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "field"),
    [(SAMPLED, "label_logprobs_BL"), (TOPK, "label_logprobs_BL"), (TOPK, "logprobs_BLK"), (TOPK, "tail_BL")],
)
def test_a_value_that_is_not_finite_is_refused(codecs, make_block, name: str, field: str, value: float) -> None:
    with pytest.raises(InputError, match=r"not finite; found 1 of"):
        codecs[name].encode(*_with(make_block(codecs[name]), field, lambda array: _broken(array, value)))


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("counts_D", lambda a: _broken(a, a.flat[a.size // 2] + 1), "counts of row 30 do not sum; found 21, expected"),
        ("counts_D", lambda a: _broken(a, 0), "an id without draws"),
        ("counts_D", lambda a: a[:-1], "ids, counts and num_ids disagree"),
        ("num_ids_BL", lambda a: _broken(a, 0), "ids, counts and num_ids disagree"),
        ("num_ids_BL", lambda a: np.roll(a, 1), "counts of row 0 do not sum"),
    ],
)
def test_counts_that_do_not_fit_their_rows_are_refused(codecs, make_block, field: str, change, message: str) -> None:
    block = make_block(codecs[SAMPLED])
    if field == "counts_D" and "row 30" in message:
        row = int(np.searchsorted(np.cumsum(block.targets.num_ids_BL), len(block.targets.counts_D) // 2, "right"))
        message = message.replace("row 30", f"row {row}")
    with pytest.raises(InputError, match=message):
        codecs[SAMPLED].encode(*_with(block, field, change))


def test_a_row_without_ids_is_refused_though_all_numbers_add_up(codecs, make_block) -> None:
    block = make_block(codecs[SAMPLED])
    num_ids_BL = block.targets.num_ids_BL.copy()
    num_ids_BL[0, 1] += num_ids_BL[0, 0]
    num_ids_BL[0, 0] = 0
    with pytest.raises(InputError, match="a row without ids"):
        codecs[SAMPLED].encode(*_with(block, "num_ids_BL", lambda _: num_ids_BL))


def test_an_unknown_codec_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"unknown codec; found sampled-arrow-2, expected .*sampled-arrow-1"):
        codec_for("sampled-arrow-2", 8, {"vocab_size": 10, "num_ids": 1})


@pytest.mark.parametrize(
    "settings", [{}, {"vocab_size": 9}, {"vocab_size": 9, "num_ids": "many"}, {"vocab": 9, "n": 1}]
)
def test_a_codec_whose_settings_are_not_its_own_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=r"codec sampled-arrow-1 has other settings; found .*expected numbers vocab_size"
    ):
        codec_for(SAMPLED, 8, settings)


@pytest.mark.parametrize("name", [SEQUENCES, SAMPLED, TOPK])
def test_a_codec_is_rebuilt_from_what_the_manifest_says(codecs, name: str) -> None:
    assert codec_for(name, codecs[name].seq_len, codecs[name].settings) == codecs[name]


@pytest.mark.parametrize("name", [SEQUENCES, SAMPLED, TOPK])
def test_no_flipped_bit_changes_what_is_read(codecs, make_block, assert_same, name: str) -> None:
    """A frame can say one content in several ways: a flip that only says it otherwise is left to the crc32."""
    block = make_block(codecs[name], 1)
    data = codecs[name].encode(block.sequences, block.targets)
    found = 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            decoded = codecs[name].decode(bytes(flipped), "here")
        except CorruptError:
            found += 1
        else:
            assert_same(decoded, block)
    # measured: 99.1 % to 99.6 %
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
@pytest.mark.parametrize("name", [SEQUENCES, SAMPLED, TOPK])
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


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (SEQUENCES, SAMPLED),
        (SEQUENCES, TOPK),
        (SAMPLED, TOPK),
        (TOPK, SAMPLED),
    ],
)
def test_a_member_of_another_codec_is_refused(codecs, make_block, written: str, read: str) -> None:
    block = make_block(codecs[written])
    with pytest.raises(CorruptError, match="cannot be decoded"):
        codecs[read].decode(codecs[written].encode(block.sequences, block.targets), "here")


@pytest.mark.parametrize("change", [{"seq_len": 11}, {"vocab_size": 200}, {"num_ids": 7}])
@pytest.mark.parametrize("name", [SAMPLED, TOPK])
def test_a_member_that_contradicts_the_manifests_settings_is_refused(codecs, make_block, name: str, change) -> None:
    block = make_block(codecs[name])
    data = codecs[name].encode(block.sequences, block.targets)
    with pytest.raises(CorruptError, match="cannot be decoded"):
        dataclasses.replace(codecs[name], **change).decode(data, "here")


def test_every_refusal_is_one_that_the_command_line_can_print(codecs) -> None:
    rng = np.random.default_rng(0)
    for size in range(0, 400, 7):
        with pytest.raises(CapgapError):
            codecs[TOPK].decode(rng.bytes(size), "here")


def _with(block: Block, field: str, change: Callable[[np.ndarray], np.ndarray]):
    """The block's two records with one array changed."""
    records = []
    for record in (block.sequences, block.targets):
        if hasattr(record, field):
            record = dataclasses.replace(record, **{field: change(getattr(record, field))})
        records.append(record)
    return records
