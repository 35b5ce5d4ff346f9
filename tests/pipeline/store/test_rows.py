"""Legend: R rows of W targets, K ids of the widest row."""

from __future__ import annotations

import pytest
import torch

from capgap.pipeline.store import LoaderSettings, SequenceLoader, ShardReader
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK
from capgap.schemas.errors import InputError

SIZES = ((7, 5), (9,), (1, 6, 8, 5))


@pytest.fixture(params=[SEQUENCES, SAMPLED, TOPK])
def reader(codecs, make_reader, request) -> ShardReader:
    """41 sequences of 12 targets."""
    return make_reader(codecs[request.param], SIZES)


@pytest.mark.parametrize("row_len", [12, 13, 24, 29, 49])
def test_rows_hold_the_sequences_one_after_the_other_and_padding_without_weight(reader, row_len: int) -> None:
    per_row, padding = divmod(row_len, 12)
    plain = SequenceLoader(reader, LoaderSettings(8, 3, num_epochs=2))
    loader = SequenceLoader(reader, LoaderSettings(8, 3, num_epochs=2, row_len=row_len))
    assert loader.shape == (8 // per_row, row_len)
    for batch, alone in zip(loader, plain, strict=True):
        assert batch.input_ids_BL.shape == batch.labels_BL.shape == (8 // per_row, row_len)
        whole = per_row * 12
        assert torch.equal(batch.input_ids_BL[:, :whole].reshape(8, 12), alone.input_ids_BL)
        assert torch.equal(batch.labels_BL[:, :whole].reshape(8, 12), alone.labels_BL)
        assert (batch.labels_BL[:, whole:] == -100).all()
        expected = [*range(12)] * per_row + [*range(padding)]
        assert batch.positions_BL is not None and batch.positions_BL.tolist() == [expected] * (8 // per_row)
        for name in ("ids_NK", "weights_NK", "tail_N"):
            found, without = getattr(batch, name), getattr(alone, name)
            if without is None:
                assert found is None
                continue
            assert found.dtype == without.dtype
            by_row = found.view(8 // per_row, row_len, *found.shape[1:])
            assert torch.equal(by_row[:, :whole].reshape(without.shape), without)
            assert not by_row[:, whole:].any()


@pytest.mark.parametrize("decode_on", [None, "cpu"])
@pytest.mark.parametrize("row_len", [None, 12, 29])
def test_under_the_rule_document_positions_begin_anew_at_each_document(reader, row_len, decode_on) -> None:
    loader = SequenceLoader(
        reader, LoaderSettings(8, 3, num_epochs=2, row_len=row_len, context="document", decode_on=decode_on, pin=False)
    )
    plain = SequenceLoader(reader, LoaderSettings(8, 3, num_epochs=2, row_len=row_len))
    per_row, width = (row_len or 12) // 12, row_len or 12
    for number, (batch, alone) in enumerate(zip(loader, plain, strict=True)):
        expected = []
        for place in loader.places(number):
            starts_L = reader.read_member(place.shard, place.member)[0].starts_BL1[place.row, :-1]
            for start in starts_L:
                # where one begins, and at the beginning of the sequence, which may be within one
                expected.append(0 if start or len(expected) % 12 == 0 else expected[-1] + 1)
        assert batch.positions_BL is not None
        assert batch.positions_BL[:, : per_row * 12].flatten().tolist() == expected
        assert (batch.positions_BL[:, per_row * 12 :] == torch.arange(width - per_row * 12)).all()
        assert (batch.positions_BL == 0).sum() > 8 + per_row, "or no document begins within a sequence"
        for name in ("input_ids_BL", "labels_BL", "ids_NK"):
            found, without = getattr(batch, name), getattr(alone, name)
            assert found is without is None or torch.equal(found, without), name


def test_a_resumed_loader_gives_the_same_rows(reader) -> None:
    whole = list(SequenceLoader(reader, LoaderSettings(8, 3, num_epochs=2, row_len=29)))
    first = SequenceLoader(reader, LoaderSettings(8, 3, num_epochs=2, row_len=29))
    next(iter(first))
    second = SequenceLoader(reader, LoaderSettings(8, 3, num_epochs=2, row_len=29))
    second.load_state_dict(first.state_dict())
    for batch, expected in zip(second, whole[1:], strict=True):
        for a, b in zip(batch.tensors().values(), expected.tensors().values(), strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"row_len": 11}, "row_len; found 11, expected at least 12, the targets of a sequence"),
        ({"row_len": 36}, "does not fill its rows; found 8 sequences, 3 a row, expected a multiple of 3"),
        ({"row_len": 24, "micro_batch": 1}, "found 1 sequences, 2 a row"),
    ],
)
def test_rows_that_cannot_be_filled_are_refused(reader, settings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SequenceLoader(reader, LoaderSettings(8, 3, **settings))
