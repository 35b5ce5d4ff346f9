"""What a device decodes is what the host decodes, for every codec, selection and shape.

Legend: B sequences, L targets a sequence, N = B x L rows, K ids kept.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.pipeline.store import (
    Batch,
    LoaderSettings,
    MixedLoader,
    Ranking,
    SequenceLoader,
    columns,
    target_temperature_of,
)
from capgap.pipeline.store.batch import collate
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK, TOPK_CODECS, Codec
from capgap.pipeline.store.device import DeviceDecoder
from capgap.pipeline.store.device_targets import Tables, sampled_rows, topk_rows
from capgap.pipeline.store.stored import read_stored
from capgap.pipeline.store.stored_batch import gather
from capgap.schemas.errors import CorruptError
from capgap.schemas.records import SampledTargets, Sequences, TopkTargets

CODECS = [SEQUENCES, SAMPLED, *TOPK_CODECS.values()]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES, scope="module")
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU can be used")
    return str(request.param)


def assert_alike(found: Batch, expected: Batch) -> None:
    assert found.num_counted == expected.num_counted == int((expected.labels_BL >= 0).sum())
    for name, there in expected.tensors().items():
        here = getattr(found, name)
        assert (here is None) == (there is None), name
        if there is None:
            continue
        assert here.dtype == there.dtype and here.shape == there.shape, name
        if here.dtype == torch.float32:
            # exp and a sum of up to 300 numbers, by two libraries; below 1e-38 float32 loses bits of its own
            torch.testing.assert_close(here.cpu(), there, rtol=3e-6, atol=1e-37)
        else:
            assert torch.equal(here.cpu(), there), name


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=40)
@given(
    vocab_size=st.sampled_from([2, 255, 256, 257, 1000, 65537]),
    num_ids=st.sampled_from([1, 2, 3, 9, 64, 300]),
    length=st.integers(1, 21),
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([None, 0.5, 4.0]),
    context=st.sampled_from(["packed", "document"]),
    data=st.data(),
)
def test_batches_are_those_of_the_host(
    name, make_block, device, vocab_size, num_ids, length, seed, temperature, context, data
) -> None:
    num_ids = 0 if name == SEQUENCES else num_ids if name == SAMPLED else min(num_ids, vocab_size)
    rng = np.random.default_rng(seed)
    ranking = Ranking(rng.permutation(vocab_size).astype(np.int32))
    codec, target = Codec(name, length, vocab_size, num_ids, ranking), None
    if temperature is not None and name in TOPK_CODECS.values():
        codec = dataclasses.replace(codec, extra_temperatures=(2.0, temperature))
        target = target_temperature_of(codec, codec.temperature, temperature)
    blocks = [make_block(codec, int(rng.integers(1, 5)), seed % 1000 + i) for i in range(2)]
    members = [codec.encode(block.sequences, block.targets) for block in blocks]
    rows = [(i, row) for i, block in enumerate(blocks) for row in range(len(block.sequences))]
    chosen = data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=6))
    stored, decoded = ([read(m, "here") for m in members] for read in (lambda *a: read_stored(codec, *a), codec.decode))
    decoder = DeviceDecoder(codec, device, target)
    found = decoder.decode(gather([(stored[i], row) for i, row in chosen], codec.seq_len, False, context), 0)
    assert_alike(found, collate([(*decoded[i], row) for i, row in chosen], codec.num_ids, target, context))
    assert (found.positions_BL is None) == (context == "packed")
    assert decoder.first_fault() is None


@pytest.mark.parametrize("name", TOPK_CODECS.values())
@pytest.mark.parametrize("spread", [1e-3, 3, 1e4])
def test_logprobs_are_those_of_the_host_to_the_bit(name, device, spread) -> None:
    """Also where they lie past a codec's floor, and where the tail is 0."""
    rng = np.random.default_rng(0)
    shape, codec = (7, 19, 11), Codec(name, 19, 5000, 11)
    targets = TopkTargets(
        np.array([rng.choice(5000, 11, replace=False) for _ in range(7 * 19)], np.int32).reshape(shape),
        -np.sort(rng.exponential(spread, shape), axis=2).astype(np.float32),
        rng.choice([0, 1e-9, 0.3, 1], shape[:2]).astype(np.float32),
        -rng.exponential(spread, shape[:2]).astype(np.float32),
        np.zeros((*shape[:2], 0), np.float32),
    )
    tokens_BL1 = np.zeros((7, 20), np.int32)
    data = codec.encode(Sequences(tokens_BL1, tokens_BL1 == 0, tokens_BL1 == 0), targets)
    _, expected = codec.decode(data, "here")
    assert isinstance(expected, TopkTargets)
    faults: list[torch.Tensor] = []
    batch = gather([(read_stored(codec, data, "here"), row) for row in range(7)], codec.seq_len, pin=False).to(device)
    found = topk_rows(batch, codec, Tables.of(codec, device), faults)
    assert not torch.stack(faults).any()
    for here, there in (
        (found.ids_NK, expected.ids_BLK.astype(np.int64)),
        (found.logprobs_NK, expected.logprobs_BLK),
        (found.label_logprobs_N, expected.label_logprobs_BL),
    ):
        assert here.cpu().numpy().tobytes() == there.tobytes()
    # the only exp on the way
    np.testing.assert_allclose(found.tail_N.cpu().numpy(), expected.tail_BL.ravel(), rtol=1e-6, atol=1e-37)


def test_counts_are_those_of_the_host(make_block, device) -> None:
    codec = Codec(SAMPLED, 12, 300, 400)  # counts of two bytes
    block = make_block(codec, 3)
    data = codec.encode(block.sequences, block.targets)
    _, expected = codec.decode(data, "here")
    assert isinstance(expected, SampledTargets)
    batch = gather([(read_stored(codec, data, "here"), row) for row in range(3)], codec.seq_len, pin=False).to(device)
    rows = sampled_rows(batch, codec, Tables.of(codec, device), [])
    is_id_NK = rows.counts_NK > 0
    assert (rows.ids_NK[is_id_NK].cpu().numpy() == expected.ids_D).all()
    assert (rows.counts_NK[is_id_NK].cpu().numpy() == expected.counts_D).all()
    assert (is_id_NK.sum(1).cpu().numpy() == expected.num_ids_BL.ravel()).all()


@pytest.mark.parametrize("name", CODECS[1:])
@pytest.mark.parametrize("shift", [-1, 1])
def test_targets_one_position_off_are_found_on_the_device(codecs, make_block, device, name: str, shift: int) -> None:
    codec = codecs[name]
    block = make_block(codec, 8)
    tokens_BL1 = np.roll(block.sequences.tokens_BL1, shift, axis=1)
    moved = dataclasses.replace(block.sequences, tokens_BL1=tokens_BL1)
    decoder = DeviceDecoder(codec, device)
    for number, sequences in ((3, block.sequences), (5, moved), (7, moved), (8, block.sequences)):
        stored = read_stored(codec, codec.encode(sequences, block.targets), "here")
        decoder.decode(gather([(stored, row) for row in range(8)], codec.seq_len, pin=False), number)
        assert decoder.first_fault() == (None if number == 3 else 5)


def _broken(stored, **arrays):
    return dataclasses.replace(stored, **{part: getattr(stored, part) | values for part, values in arrays.items()})


@pytest.mark.parametrize(
    ("name", "column"),
    [
        (SEQUENCES, "tokens_1"),
        (SAMPLED, "repeated_1"),
        (SAMPLED, "once_1"),
        (TOPK, "ids_1"),
        (TOPK_CODECS["compact"], "escapes"),
        (TOPK_CODECS["compact"], "quads"),
        (TOPK_CODECS["small"], "ids_1"),
        (TOPK_CODECS["lossless"], "logprobs_3"),
    ],
)
def test_values_that_contradict_the_format_are_found_on_the_device(
    codecs, make_block, device, name: str, column: str
) -> None:
    """An id past the vocabulary, codes past the last, other escapes than quads name, a logprob that is none."""
    codec = codecs[name]
    block = make_block(codec, 4)
    stored = read_stored(codec, codec.encode(block.sequences, block.targets), "here")
    part = "fixed" if column in stored.fixed else "ragged"
    worst = np.full_like(getattr(stored, part)[column], 255)
    decoder = DeviceDecoder(codec, device)
    broken = _broken(stored, **{part: {column: worst}})
    decoder.decode(gather([(broken, row) for row in range(4)], codec.seq_len, pin=False), 0)
    assert decoder.first_fault() == 0


@pytest.mark.parametrize(("row_len", "num_epochs"), [(None, 3), (30, 3), (None, 1)])
def test_a_loader_that_decodes_on_a_device_hands_out_the_same_batches(
    make_reader, ranked_codecs, device, row_len, num_epochs
) -> None:
    reader = make_reader(ranked_codecs[TOPK_CODECS["compact"]], ((3, 4), (5,), (2, 6)))
    host, other = (
        SequenceLoader(reader, LoaderSettings(4, 0, num_epochs=num_epochs, row_len=row_len, decode_on=on))
        for on in (None, device)
    )
    pairs = list(zip(host, other, strict=True))
    assert len(pairs) == len(host) == 5 * num_epochs
    for expected, found in pairs:
        assert found.labels_BL.device.type == device
        assert_alike(found, expected)
    assert host.state_dict() == other.state_dict()
    assert_alike(other.micro_batch(4), host.micro_batch(4))


def _misaligned(make_reader, codec: Codec, monkeypatch) -> SequenceLoader:
    """Shards whose third member was written with its tokens one position off."""
    encode = Codec.encode
    written = []

    def moved(self, sequences, targets=None):
        written.append(sequences)
        if len(written) == 3:
            sequences = dataclasses.replace(sequences, tokens_BL1=np.roll(sequences.tokens_BL1, 1, axis=1))
        return encode(self, sequences, targets)

    monkeypatch.setattr(Codec, "encode", moved)
    reader = make_reader(codec, ((4, 4), (4, 4)))
    return SequenceLoader(reader, LoaderSettings(4, 0, num_epochs=8, decode_on="cpu"))


def test_misaligned_shards_stop_before_the_last_batch_and_are_named(make_reader, codecs, monkeypatch) -> None:
    loader = _misaligned(make_reader, codecs[TOPK], monkeypatch)
    batches = []
    with pytest.raises(CorruptError, match=r"targets-000001.tar, member targets-000001-0000, sequence \d+, target \d+"):
        for batch in loader:
            batches.append(batch)
    assert len(batches) == len(loader) - 1


def test_a_mix_that_ends_before_its_loaders_do_finds_their_faults(make_reader, codecs, monkeypatch) -> None:
    loader = _misaligned(make_reader, codecs[TOPK], monkeypatch)
    mixed = MixedLoader({"only": loader}, {"only": 1}, 0, max_tokens=5 * 4 * 12)
    assert len(mixed) == 5 < len(loader)
    batches = []
    with pytest.raises(CorruptError, match="targets are not aligned with their tokens"):
        for batch in mixed:
            batches.append(batch)
    assert len(batches) == 4


def test_no_state_is_saved_once_a_batch_was_at_fault(make_reader, codecs, monkeypatch) -> None:
    loader = _misaligned(make_reader, codecs[TOPK], monkeypatch)
    loader.state_dict()
    batches = iter(loader)
    for _ in range(4):  # one epoch: all members
        next(batches)
    with pytest.raises(CorruptError, match="targets are not aligned with their tokens"):
        loader.state_dict()
    batches.close()


def test_a_device_that_miscalculates_is_not_blamed_on_the_shards(make_reader, codecs, monkeypatch) -> None:
    loader = SequenceLoader(make_reader(codecs[TOPK], ((4, 4),)), LoaderSettings(4, 0, decode_on="cpu"))
    monkeypatch.setattr(DeviceDecoder, "first_fault", lambda self: 1)
    with pytest.raises(CorruptError, match=r"micro-batch 1, of .*targets-000000.tar.*train.decode: host"):
        list(loader)


def test_stored_blocks_take_less_memory_than_decoded_ones(make_reader, codecs) -> None:
    reader = make_reader(codecs[TOPK_CODECS["compact"]], ((6, 6),))
    host, other = (
        SequenceLoader(reader, LoaderSettings(4, 0, num_epochs=2, decode_on=on, threads=0)) for on in (None, "cpu")
    )
    for loader in (host, other):
        list(loader)
    assert 0 < other.blocks.num_bytes < host.blocks.num_bytes / 2


@pytest.mark.parametrize("name", CODECS[1:])
def test_lists_whose_sizes_contradict_one_another_are_found_on_the_host(codecs, make_block, monkeypatch, name) -> None:
    """A sequence's values could otherwise be taken for another's."""
    codec = codecs[name]
    block = make_block(codec, 4)
    stored = read_stored(codec, codec.encode(block.sequences, block.targets), "here")
    ragged = [column for column in stored.ragged if column != "escapes"]
    if not ragged:
        return
    ragged_parts = columns.Columns.ragged_parts
    for broken in ragged:

        def shifted(self, column, kind=np.uint8, broken=broken):
            values, offsets = ragged_parts(self, column, kind)
            offsets = offsets.copy()
            offsets[1] += column == broken
            return values, offsets

        monkeypatch.setattr(columns.Columns, "ragged_parts", shifted)
        with pytest.raises(CorruptError, match="cannot be decoded"):
            read_stored(codec, codec.encode(block.sequences, block.targets), "here")
