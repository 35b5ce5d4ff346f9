from __future__ import annotations

import math

import pytest
import torch

from capgap.pipeline.store import Batch
from capgap.pipeline.store.rows import in_rows
from capgap.pipeline.train.staleness import ratio_figures


def test_a_text_of_its_own_is_worth_all_its_tokens() -> None:
    logprobs_N = torch.linspace(-5, 0, 11)
    found = ratio_figures(logprobs_N, logprobs_N)
    assert (found.mean, found.p5, found.median, found.p95, found.outside, found.effective) == (1, 1, 1, 1, 0, 1)


def test_ratios_are_told_by_their_quantiles_and_what_they_are_worth() -> None:
    # 101 of them from 0.5 to 1.5: every hundredth is a quantile
    ratios_N = torch.linspace(0.5, 1.5, 101, dtype=torch.float64)
    found = ratio_figures(ratios_N.log(), torch.zeros(101), clip=0.205)
    assert (found.mean, found.p5, found.median, found.p95) == pytest.approx((1, 0.55, 1, 1.45))
    assert found.outside == pytest.approx(60 / 101)
    assert found.effective == pytest.approx(float(1 / (ratios_N**2).mean()))
    assert ratio_figures(ratios_N.log(), torch.zeros(101), clip=0.405).outside == pytest.approx(20 / 101)
    # one token has all the weight
    lone = ratio_figures(torch.tensor([0.0, -50.0, -50.0, -50.0]), torch.full((4,), -math.log(2)))
    assert lone.effective == pytest.approx(1 / 4)


def test_logprobs_go_along_where_sequences_share_a_row() -> None:
    ids_BL = torch.arange(12).view(2, 6)
    writer_N, teacher_N = -torch.arange(12.0), -torch.arange(12.0) / 2
    batch = Batch(ids_BL, ids_BL, writer_logprobs_N=writer_N, teacher_logprobs_N=teacher_N)
    found = in_rows(batch, 14)
    assert found.writer_logprobs_N is not None and found.teacher_logprobs_N is not None
    assert found.writer_logprobs_N.tolist() == [*writer_N.tolist(), 0, 0]
    assert found.teacher_logprobs_N.tolist() == [*teacher_N.tolist(), 0, 0]
    assert (found.labels_BL.flatten()[-2:] < 0).all()
