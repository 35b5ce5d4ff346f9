"""Students against held-out targets whose answers are known.

Legend: N rows, K ids kept, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from capgap.kernels.sparse_kl import SparseTargets
from capgap.kernels.sparse_kl.reference import linear_sparse_kl
from capgap.pipeline.eval.cached import CachedSums, against_targets, cached_rows, score_on_cache
from capgap.pipeline.stage.context import StageInput
from capgap.pipeline.store.quarantine import write_quarantine
from capgap.schemas.results import HeldoutCache


def test_a_student_that_is_the_teacher_has_no_kl() -> None:
    logp_NV = torch.randn(20, 50).log_softmax(-1)
    kept = logp_NV.topk(7)
    p_NK = kept.values.exp()
    found = against_targets(kept.indices, p_NK, 1 - p_NK.sum(1), logp_NV)
    # float32 probabilities
    assert found[:, 0].abs().max() < 1e-6
    assert (found[:, 1] == 1).all()


def test_the_kl_is_that_of_training() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(30, 50, generator=generator) * 2
    kept = (torch.randn(30, 50, generator=generator) * 2).log_softmax(-1).topk(7)
    p_NK = kept.values.exp()
    p_NK[:, 5:] *= torch.rand(30, 1, generator=generator) < 0.5  # padding, whose id is any
    tail_N = 1 - p_NK.sum(1)
    found = against_targets(kept.indices, p_NK, tail_N, logits_NV.log_softmax(-1))[:, 0]
    trained = linear_sparse_kl(
        logits_NV.double(),
        torch.eye(50, dtype=torch.float64),
        SparseTargets(kept.indices, p_NK.double(), tail_N.double()),
        torch.zeros(30, dtype=torch.int64),
        alpha=1.0,
    )
    assert trained.kl_N is not None
    # the student's logprobs are float32
    torch.testing.assert_close(found, trained.kl_N, atol=2e-6, rtol=0)


def test_draws_give_the_cross_entropy_with_them() -> None:
    ids_NK, p_NK = torch.tensor([[3, 1], [2, 0]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    q_NV = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.4, 0.3, 0.2, 0.1]])
    found = against_targets(ids_NK, p_NK, None, q_NV.log())
    expected = [-0.25 * math.log(0.2) - 0.75 * math.log(0.5), -math.log(0.2)]
    assert found[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert found[:, 1].tolist() == [1, 0]


def test_a_tail_of_nothing_is_no_cell() -> None:
    """Every id is kept: what is left of the student's probability is none, and its logarithm -inf."""
    p_NV = torch.tensor([[0.5, 0.3, 0.2]])
    q_NV = torch.tensor([[0.2, 0.3, 0.5]])
    found = against_targets(torch.tensor([[0, 1, 2]]), p_NV, torch.zeros(1), q_NV.log())
    assert found[0, 0].item() == pytest.approx(float((p_NV * (p_NV / q_NV).log()).sum()), rel=1e-6)


def _scored(model: LlamaForCausalLM, cache: StageInput) -> CachedSums:
    rows = cached_rows(cache, 100)
    assert rows is not None
    return score_on_cache(model, rows, name="m", vocab_size=128, batch_sequences=2, meter=None)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cross_entropies_with_draws_differ_as_kls_do(
    tmp_path, make_eval_cache, make_model, make_sequences, temperature
) -> None:
    twin, other = make_model(0), make_model(3)
    caches = {
        name: make_eval_cache(tmp_path / name, make_sequences(), twin, {name: num_ids}, temperature)
        for name, num_ids in {"topk": 128, "sampled": 2000}.items()
    }
    rows = cached_rows(caches["sampled"], 100)
    assert rows is not None
    described, labels_S = rows.described()
    assert (described.temperature, described.teacher_loss is None) == (temperature, temperature == 2)
    kl, ce = (
        (_scored(other, caches[name]).apart_S.sum() - _scored(twin, caches[name]).apart_S.sum()) / labels_S.sum()
        for name in ("topk", "sampled")
    )
    assert kl > 0.3
    # 2000 systematic samples leave each id's share within 1/2000; logprobs of 128 ids spread over a few nats
    assert ce == pytest.approx(kl, abs=0.02)


def test_the_teacher_s_loss_is_unknown_where_a_label_s_logprob_is(
    tmp_path, make_eval_cache, make_model, make_sequences
) -> None:
    for unknown_labels in (False, True):
        folder = tmp_path / str(unknown_labels)
        cache = make_eval_cache(folder, make_sequences(), make_model(), {"topk": 4}, 1.0, unknown_labels=unknown_labels)
        rows = cached_rows(cache, 100)
        assert rows is not None
        described, _ = rows.described()
        assert (described.teacher_loss is None) == unknown_labels
        assert HeldoutCache.model_validate_json(described.model_dump_json()) == described


def test_held_out_shards_in_quarantine_are_not_measured_on(
    tmp_path, make_eval_cache, make_model, make_sequences, caplog
) -> None:
    cache = make_eval_cache(tmp_path / "cache", make_sequences(), make_model(), {"topk": 4}, 1.0)
    assert cached_rows(cache, 9) is not None
    write_quarantine(cache.path, {"heldout-topk-000000.tar": "damaged"})
    assert cached_rows(cache, 9) is None
    assert "held-out shards of the cache are in quarantine" in caplog.text
