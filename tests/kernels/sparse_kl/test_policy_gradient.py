from __future__ import annotations

import pytest
import torch

from capgap.kernels.sparse_kl import importance_ratio, linear_label_logprobs, policy_gradient

NUM_ROWS, VOCAB, WIDTH = 12, 7, 5


def rows(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and a head of a student, and the log-probabilities of its teacher and of the writer."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    hidden_NH, weight_VH = normal(NUM_ROWS, WIDTH).requires_grad_(), normal(VOCAB, WIDTH).requires_grad_()
    return hidden_NH, weight_VH, normal(NUM_ROWS, VOCAB).log_softmax(-1), normal(NUM_ROWS, VOCAB).log_softmax(-1)


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def test_the_slope_is_that_of_the_dense_form() -> None:
    hidden_NH, weight_VH, teacher_NV, writer_NV = rows(0)
    labels_N1 = torch.arange(NUM_ROWS)[:, None] % VOCAB
    teacher_N, writer_N = (one.gather(1, labels_N1)[:, 0] for one in (teacher_NV, writer_NV))
    logprobs_N = linear_label_logprobs(hidden_NH, weight_VH, labels_N1[:, 0])
    found = gradients(policy_gradient(logprobs_N, teacher_N, writer_N, 0.2).sum(), hidden_NH, weight_VH)
    dense_N = (hidden_NH @ weight_VH.T).log_softmax(-1).gather(1, labels_N1)[:, 0]
    ratio_N, advantage_N = (dense_N - writer_N).exp(), teacher_N - dense_N.detach()
    # PPO, told case by case
    stopped_N = ((advantage_N > 0) & (ratio_N > 1.2)) | ((advantage_N < 0) & (ratio_N < 0.8))
    assert stopped_N.any() and not stopped_N.all()
    expected = gradients(-(ratio_N * advantage_N)[~stopped_N].sum(), hidden_NH, weight_VH)
    # float64 sums in another order
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_over_the_writers_samples_it_is_the_slope_of_the_reverse_kl_however_old_they_are() -> None:
    hidden_NH, weight_VH, teacher_NV, writer_NV = rows(1)
    logq_NV = (hidden_NH @ weight_VH.T).log_softmax(-1)
    expected = gradients((logq_NV.exp() * (logq_NV - teacher_NV)).sum(), hidden_NH, weight_VH)
    # every token as often as the writer samples it; no clip
    logq_NV = (hidden_NH @ weight_VH.T).log_softmax(-1)
    each_NV = policy_gradient(logq_NV, teacher_NV, writer_NV, 1e9)
    found = gradients((writer_NV.exp() * each_NV).sum(), hidden_NH, weight_VH)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_tokens_that_nobody_expected_stay_finite() -> None:
    logprobs_N = torch.tensor([-0.1, -200.0], requires_grad=True)
    found_N = policy_gradient(logprobs_N, torch.tensor([-500.0, -0.1]), torch.tensor([-300.0, -0.1]), 0.2)
    (slope_N,) = gradients(found_N.sum(), logprobs_N)
    assert torch.isfinite(found_N).all() and torch.isfinite(slope_N).all()
    assert importance_ratio(torch.zeros(1), torch.tensor([-300.0])).square().isfinite().all()


@pytest.mark.parametrize("clip", [0.0, -0.2, float("inf"), float("nan")])
def test_a_clip_that_is_none_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match="clip: got"):
        policy_gradient(torch.zeros(1), torch.zeros(1), torch.zeros(1), clip)
