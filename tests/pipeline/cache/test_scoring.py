from __future__ import annotations

import numpy as np
import pytest
import torch

from capgap.pipeline.cache.scoring import (
    PackedRows,
    Recording,
    Request,
    record_rows,
    row_offsets,
    sequence_digest,
    unpack,
)
from capgap.schemas.errors import InputError

KINDS = pytest.mark.parametrize("kind", ["topk", "sampled", "both"])


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of 320 columns, 20 of them padding and by far the most probable; labels; offsets."""
    generator = torch.Generator().manual_seed(5)
    logits_NV = torch.randn(96, 320, generator=generator) * 3
    logits_NV[:, 300:] += 12
    return logits_NV, torch.randint(0, 300, (96,), generator=generator), torch.rand(96, generator=generator)


def test_the_digest_is_that_of_the_tokens_alone() -> None:
    tokens_L1 = np.arange(40, dtype=np.int32)
    digest = sequence_digest(tokens_L1)
    assert len(digest) == 16
    assert digest == Request(tokens_L1.copy()).digest
    assert digest == sequence_digest(tokens_L1.astype(np.int64))
    assert digest == sequence_digest(np.repeat(tokens_L1, 2)[::2]), "strides are no part of a sequence"
    others = [tokens_L1[:-1], tokens_L1[1:], tokens_L1[::-1], np.where(tokens_L1 == 39, 0, tokens_L1)]
    assert len({digest, *(sequence_digest(other) for other in others)}) == 5


def test_an_offset_is_a_pure_function_of_seed_tokens_and_position(recording) -> None:
    digest = sequence_digest(np.arange(40, dtype=np.int32))
    whole_L = row_offsets(recording("sampled"), digest, 0, 40)
    pieces = [row_offsets(recording("sampled"), digest, start, 13) for start in (0, 13, 26)]
    assert (np.concatenate(pieces) == whole_L[:39]).all()
    assert (row_offsets(recording("sampled", num_ids=7, temperature=2.0), digest, 0, 40) == whole_L).all()
    assert (row_offsets(recording("sampled", seed=1), digest, 0, 40) != whole_L).any()
    assert (row_offsets(recording("sampled"), sequence_digest(np.arange(41)), 0, 40) != whole_L).any()


def test_nothing_is_drawn_for_topk(recording) -> None:
    assert row_offsets(recording("topk"), b"", 0, 4) is None


@KINDS
@pytest.mark.parametrize("size", [1, 7, 95])
def test_chunks_of_rows_give_what_all_rows_give(recording, rows, kind: str, size: int) -> None:
    logits_NV = rows[0]
    whole = record_rows(recording(kind), *_given(rows, kind))
    parts = [
        record_rows(recording(kind), *_given(tuple(rows_N[i : i + size] for rows_N in rows), kind))
        for i in range(0, len(logits_NV), size)
    ]
    assert torch.equal(torch.cat([p.ids_NC for p in parts]), whole.ids_NC)
    assert torch.equal(torch.cat([p.numbers_NW for p in parts]), whole.numbers_NW)


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_padding_is_never_kept_but_counts_for_the_teachers_own_top(recording, rows, kind, temperature) -> None:
    made = recording(kind, temperature=temperature)
    scored = _scored(made, record_rows(made, *_given(rows, kind), torch.tensor([95])))
    assert np.concatenate([scored.samples_Ln, scored.ids_LK], axis=1).max() < 300
    logits_NV, labels_N, _ = rows
    expected_NV = torch.log_softmax(logits_NV[:, :300].double() / temperature, -1)
    label_N = expected_NV.gather(1, labels_N[:, None])[:, 0]
    # float32 rounding of logprobs of up to 20 nats
    assert np.abs(scored.label_logprobs_L - label_N.numpy()).max() < 1e-5
    own_V = torch.log_softmax(logits_NV[-1].double(), -1)
    assert own_V.argmax() >= 300, "or padding is not what the teacher would choose"
    assert abs(scored.top_logprob - own_V.max()) < 1e-5
    if kind != "sampled":
        kept_NK, ids_NK = expected_NV.topk(16, -1)
        assert (scored.ids_LK == ids_NK.numpy()).all()
        assert np.abs(scored.logprobs_LK - kept_NK.numpy()).max() < 1e-5
        assert np.abs(scored.tail_L - (1 - kept_NK.exp().sum(-1)).numpy()).max() < 1e-6


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_own_top_is_at_temperature_1_and_of_the_last_row(recording, rows, kind: str, temperature: float) -> None:
    logits_NV, labels_N, offsets_N = rows
    made = recording(kind, temperature=temperature, vocab_size=320)
    packed = record_rows(made, *_given((logits_NV, labels_N, offsets_N), kind), torch.tensor([95]))
    own = torch.log_softmax(logits_NV[-1].double(), -1).max()
    assert abs(_scored(made, packed).top_logprob - own) < 1e-5  # float32 rounding
    assert not packed.numbers_NW[:-1, 1].any()


@KINDS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize("num_padding", [20, 60], ids=["few", "many"])
def test_what_stands_in_a_padding_column_changes_nothing(recording, rows, kind: str, value: float, num_padding) -> None:
    logits_NV, labels_N, offsets_N = rows
    vocab_size = 320 - num_padding
    labels_N = labels_N.clamp(max=vocab_size - 1)
    made = recording(kind, vocab_size=vocab_size)
    other_NV = logits_NV.clone()
    other_NV[:, vocab_size:] = value
    expected = record_rows(made, *_given((logits_NV, labels_N, offsets_N), kind))
    found = record_rows(made, *_given((other_NV, labels_N, offsets_N), kind))
    assert torch.equal(found.ids_NC, expected.ids_NC) and torch.equal(found.numbers_NW, expected.numbers_NW)
    _scored(made, found)  # raises where a number is not finite


def test_both_are_taken_apart_into_each(recording, rows) -> None:
    extra = (3.0, 0.5)
    scored = {}
    for kind in ("topk", "sampled", "both"):
        made = recording(kind, extra_temperatures=() if kind == "sampled" else extra)
        scored[kind] = _scored(made, record_rows(made, *_given(rows, kind)))
    both = vars(scored["both"])
    assert (both["samples_Ln"] == scored["sampled"].samples_Ln).all() and scored["topk"].samples_Ln.shape == (96, 0)
    for name in ("ids_LK", "logprobs_LK", "tail_L", "log_tails_LT", "label_logprobs_L"):
        assert (both[name] == getattr(scored["topk"], name)).all(), name
    assert scored["sampled"].ids_LK.shape == (96, 0) and both["log_tails_LT"].shape == (96, 2)
    other_NV = torch.log_softmax(rows[0][:, :300].double(), -1).scatter(
        1, torch.tensor(both["ids_LK"]).long(), -torch.inf
    )
    for number, temperature in enumerate(extra):
        expected_N = torch.logsumexp(other_NV / temperature, -1)
        assert np.abs(both["log_tails_LT"][:, number] - expected_N.numpy()).max() < 1e-4  # float32, times 2


@KINDS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused_with_their_row(recording, rows, kind: str, value: float) -> None:
    logits_NV, labels_N, offsets_N = rows
    poisoned_NV = logits_NV.clone()
    poisoned_NV[17, 4] = value
    poisoned_NV[40] = value
    with pytest.raises(InputError, match=r"sequence 5, token 17: the teacher's logits are not finite"):
        packed = record_rows(recording(kind), *_given((poisoned_NV, labels_N, offsets_N), kind))
        _scored(recording(kind), packed, "sequence 5")


def _given(rows, kind: str):
    """Logits of its own, as an engine makes them, and offsets only where something is sampled."""
    return (rows[0].clone(), rows[1], None if kind == "topk" else rows[2])


def _scored(settings: Recording, packed: PackedRows, where: str = "here"):
    return unpack(settings, packed.ids_NC.numpy(), packed.numbers_NW.numpy(), where)
