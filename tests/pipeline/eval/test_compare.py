from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from capgap.pipeline.eval.compare import Comparison, compare_rows
from capgap.pipeline.eval.intervals import resample_weights
from capgap.pipeline.eval.measure import score
from capgap.pipeline.eval.spool import open_spool
from capgap.schemas.errors import InputError, MachineError
from capgap.schemas.results import AgainstTeacher

VOCAB_SIZE = 128


def _measured(folder: Path, sequences, teacher, student, vocab_size=VOCAB_SIZE) -> AgainstTeacher:
    num_rows = int(sequences.mask_BL1[:, 1:].sum())
    common = {"vocab_size": vocab_size, "num_visited": len(sequences)}
    with open_spool(folder, num_rows, vocab_size) as spool:
        score(teacher, sequences, name="teacher", batch_sequences=4, visit=spool.append, **common)
        comparison = Comparison(spool)
        score(student, sequences, name="student", batch_sequences=3, visit=comparison.add, **common)
        return comparison.result("student")


def test_a_model_agrees_with_itself(tmp_path, make_model, make_sequences):
    found = _measured(tmp_path, make_sequences(), make_model(), make_model())
    # another batch size rounds the same products in another order
    assert found.kl == pytest.approx(0, abs=1e-9)
    assert (found.top1, found.top5) == (1, 1)
    assert found.acceptance == pytest.approx(1, abs=1e-5)


def test_numbers_equal_a_float64_computation(tmp_path, make_model, make_sequences):
    teacher, student, sequences = make_model(0, rows=160), make_model(1, rows=136), make_sequences()
    found = _measured(tmp_path, sequences, teacher, student)
    inputs = torch.from_numpy(sequences.tokens_BL1[:, :-1]).long()
    mask = torch.from_numpy(sequences.mask_BL1[:, 1:])
    with torch.inference_mode():
        teacher_NV = teacher(input_ids=inputs).logits[mask][:, :VOCAB_SIZE].double().log_softmax(-1)
        student_NV = student(input_ids=inputs).logits[mask][:, :VOCAB_SIZE].double().log_softmax(-1)
    kl = (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1).mean().item()
    acceptance = torch.minimum(teacher_NV.exp(), student_NV.exp()).sum(-1).mean().item()
    top1 = (teacher_NV.argmax(-1) == student_NV.argmax(-1)).double().mean().item()
    pairs = zip(teacher_NV.topk(5).indices.tolist(), student_NV.topk(5).indices.tolist(), strict=True)
    top5 = sum(len(set(a) & set(b)) for a, b in pairs) / (5 * len(teacher_NV))
    # float32 logits of two batchings; the sums themselves are float64
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert found.acceptance == pytest.approx(acceptance, rel=1e-5)
    assert (found.top1, found.top5) == pytest.approx((top1, top5))
    assert found.kl > 0.1
    assert 0 < found.acceptance < 1


def test_an_id_that_the_teacher_excludes_adds_nothing():
    teacher_NV = torch.tensor([[0.5, 0.5, 0.0]]).log()
    ((kl, _, _, acceptance),) = compare_rows(teacher_NV, torch.tensor([[0.25, 0.25, 0.5]]).log()).tolist()
    assert kl == pytest.approx(0.6931472)
    assert acceptance == pytest.approx(0.5)
    assert compare_rows(teacher_NV, teacher_NV)[0, 0] == 0


def test_intervals_are_over_sequences(tmp_path) -> None:
    """Sequences that a student gets wholly right or wholly wrong: the interval is that of so many coins."""
    p_N2 = torch.tensor([[0.9, 0.1]]).repeat(40, 1)
    q_N2 = p_N2.clone()
    q_N2[20:] = p_N2[20:].flip(1)
    labels_S = np.full(10, 4)
    with open_spool(tmp_path, 40, 2) as spool:
        spool.append(p_N2.log())
        comparison = Comparison(spool)
        comparison.add(q_N2.log())
        found = comparison.result("student", labels_S, resample_weights(10, 2000))
    kl = 0.8 * math.log(9)
    assert (found.kl, found.top1, found.acceptance) == pytest.approx((kl / 2, 0.5, 0.6), rel=1e-6)
    assert comparison.kl_of_sequences(labels_S) == pytest.approx(np.repeat([0, 4 * kl], 5), abs=1e-6)
    # of ten coins between two and eight come down heads with a probability of 98 %, between three and seven of 89 %
    assert found.top1_interval is not None and found.kl_interval is not None and found.acceptance_interval is not None
    assert (found.top1_interval.low, found.top1_interval.high) == pytest.approx((0.2, 0.8))
    assert (found.kl_interval.low, found.kl_interval.high) == pytest.approx((0.2 * kl, 0.8 * kl), rel=1e-6)
    assert (found.acceptance_interval.low, found.acceptance_interval.high) == pytest.approx((0.36, 0.84), rel=1e-6)


def test_an_infinite_kl_names_the_student(tmp_path):
    with open_spool(tmp_path, 1, 2) as spool:
        spool.append(torch.tensor([[0.5, 0.5]]).log())
        comparison = Comparison(spool)
        comparison.add(torch.tensor([[1.0, 0.0]]).log())
        with pytest.raises(InputError, match="train/a/seed-0: the KL"):
            comparison.result("train/a/seed-0")


def test_a_spool_leaves_nothing_behind_even_on_failure(tmp_path):
    with pytest.raises(RuntimeError, match="on the way"), open_spool(tmp_path, 4, 8) as spool:
        rows_NV = torch.randn(4, 8)
        spool.append(rows_NV[:3])
        spool.append(rows_NV[3:])
        assert torch.equal(spool.rows(1, 4), rows_NV[1:])
        raise RuntimeError("on the way")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_an_error_before_any_work(tmp_path):
    with pytest.raises(MachineError, match=r"too little disk space.*lower eval.num_full_sequences"):
        open_spool(tmp_path, 10**12, 150_000).__enter__()
