from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from capgap.pipeline.eval.measure import score
from capgap.pipeline.models.head_product import sum_head_in_float32
from capgap.schemas.errors import InputError

VOCAB_SIZE = 128


def _direct(model: Any, sequences: Any) -> np.ndarray:
    tokens = torch.from_numpy(sequences.tokens_BL1).long()
    with torch.inference_mode():
        logits = model(input_ids=tokens[:, :-1]).logits[..., :VOCAB_SIZE].double()
    losses = -logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2).numpy()
    return (losses * sequences.mask_BL1[:, 1:]).sum(1)


@pytest.mark.parametrize("batch_sequences", [1, 4, 16])
def test_losses_equal_a_float64_computation_whatever_the_batch(make_model, make_sequences, batch_sequences):
    model, sequences = make_model(), make_sequences()
    nats_S = score(model, sequences, name="m", vocab_size=VOCAB_SIZE, batch_sequences=batch_sequences)
    # float32 logprobs of about 5 nats carry errors of about 1e-6; a sequence sums 20 of them
    np.testing.assert_allclose(nats_S, _direct(model, sequences), atol=5e-5)


def test_padded_vocabulary_columns_are_ignored(make_model, make_sequences):
    model, sequences = make_model(rows=160, tied=False), make_sequences()
    before = score(model, sequences, name="m", vocab_size=VOCAB_SIZE, batch_sequences=4)
    with torch.no_grad():
        model.lm_head.weight[VOCAB_SIZE:] *= 50
    after = score(model, sequences, name="m", vocab_size=VOCAB_SIZE, batch_sequences=4)
    np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(after, _direct(model, sequences), atol=5e-5)


def test_a_visit_sees_the_labelled_rows_of_the_first_sequences_in_order(make_model, make_sequences):
    model, sequences = make_model(), make_sequences()
    seen: list[torch.Tensor] = []
    nats_S = score(
        model, sequences, name="m", vocab_size=VOCAB_SIZE, batch_sequences=4, visit=seen.append, num_visited=3
    )
    logprobs_NV = torch.cat(seen)
    mask = sequences.mask_BL1[:3, 1:]
    labels_N = torch.from_numpy(sequences.tokens_BL1[:3, 1:][mask]).long()
    assert logprobs_NV.shape == (mask.sum(), VOCAB_SIZE)
    assert -logprobs_NV.gather(1, labels_N[:, None]).double().sum().item() == pytest.approx(nats_S[:3].sum(), abs=1e-4)


def test_a_bfloat16_model_gets_a_float32_head_and_keeps_its_embedding(make_model, make_sequences):
    model, sequences = make_model(), make_sequences()
    exact = score(model, sequences, name="m", vocab_size=VOCAB_SIZE, batch_sequences=4)
    model = make_model().bfloat16()
    sum_head_in_float32(model)
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    with torch.inference_mode():
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.dtype == torch.float32
    rounded = score(model, sequences, name="m", vocab_size=VOCAB_SIZE, batch_sequences=4)
    np.testing.assert_allclose(rounded, exact, rtol=0.05)  # bfloat16 keeps 8 bits in every layer


def test_a_model_with_broken_weights_is_named(make_model, make_sequences):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(
        InputError, match=r"train/distilled/seed-3: the loss of held-out sequence 0 is not a number.*nan"
    ):
        score(model, make_sequences(), name="train/distilled/seed-3", vocab_size=VOCAB_SIZE, batch_sequences=4)


def _cut(sequences: Any, seed: int = 0) -> Any:
    """The same sequences, with documents of all lengths; some sequences begin within one."""
    starts_BL1 = np.random.default_rng(seed).random(sequences.tokens_BL1.shape) < 0.2
    return dataclasses.replace(sequences, starts_BL1=starts_BL1)


@pytest.mark.parametrize("batch_sequences", [1, 3])
def test_documents_are_scored_by_themselves(make_model, make_sequences, batch_sequences) -> None:
    model, sequences = make_model(), _cut(make_sequences())
    arguments: dict[str, Any] = {"name": "m", "vocab_size": VOCAB_SIZE, "batch_sequences": batch_sequences}
    seen: list[torch.Tensor] = []
    nats_S = score(model, sequences, **arguments, context="document", visit=seen.append, num_visited=2)
    expected_S = np.zeros(len(sequences))
    labelled = []
    for row, tokens_L1 in enumerate(sequences.tokens_BL1):
        borders = [0, *np.flatnonzero(sequences.starts_BL1[row, 1:-1]) + 1, len(tokens_L1) - 1]
        for first, end in itertools.pairwise(borders):
            tokens = torch.from_numpy(tokens_L1[None, first : end + 1]).long()
            with torch.inference_mode():
                logprobs = model(input_ids=tokens[:, :-1]).logits[0, :, :VOCAB_SIZE].double().log_softmax(-1)
            nats = -logprobs.gather(1, tokens[0, 1:, None])[:, 0].numpy()
            mask = sequences.mask_BL1[row, first + 1 : end + 1]
            expected_S[row] += nats[mask].sum()
            labelled += list(nats[mask]) if row < 2 else []
    # as above
    np.testing.assert_allclose(nats_S, expected_S, atol=5e-5)
    assert not np.allclose(nats_S, score(model, sequences, **arguments), atol=1e-2), "or documents make no difference"
    labels = np.concatenate([sequences.tokens_BL1[row, 1:][sequences.mask_BL1[row, 1:]] for row in range(2)])
    found = -torch.cat(seen).gather(1, torch.from_numpy(labels)[:, None].long())[:, 0].numpy()
    np.testing.assert_allclose(found, labelled, atol=5e-6)


def test_no_forward_pass_has_more_tokens_than_its_sequences_would(make_model, make_sequences) -> None:
    model, sequences = make_model(), _cut(make_sequences())
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True)
    score(model, sequences, name="m", vocab_size=VOCAB_SIZE, batch_sequences=2, context="document")
    assert max(sizes) <= 2 * (sequences.tokens_BL1.shape[1] - 1)
