"""A step of several micro-batches against the same step as one batch, by Lightning's own loop."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from capgap.pipeline.store import Batch
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.objective import Objective
from capgap.schemas.run_optimization import OptimizationSettings

SEQ_LEN, NUM_SEQUENCES, VOCAB_SIZE = 16, 8, 40
LABELS = (0, 1, 16, 3, 16, 16, 2, 0)  # that each sequence of a step has


class _Recorded(DistillationModule):
    """Keeps the gradients that the optimizer takes, and the alphas of the micro-batches."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gradients: list[torch.Tensor] = []
        self.norms: list[float] = []
        self.alphas: list[float] = []

    def loss(self, batch: Batch, alpha: float) -> Any:
        self.alphas.append(alpha)
        return super().loss(batch, alpha)

    def configure_gradient_clipping(self, optimizer: Any, *unused: Any, **also_unused: Any) -> None:
        super().configure_gradient_clipping(optimizer)
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]).clone())
        self.norms.append(float(self.gradient_norm))


def _step_batches(micro_batch: int, labels: tuple[int, ...], seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    tokens_BL1 = torch.randint(VOCAB_SIZE, (NUM_SEQUENCES, SEQ_LEN + 1), generator=generator)
    counted_BL = torch.arange(SEQ_LEN) < torch.tensor(labels)[:, None]
    labels_BL = tokens_BL1[:, 1:].where(counted_BL, -100)
    ids_BLK = torch.rand((NUM_SEQUENCES, SEQ_LEN, VOCAB_SIZE), generator=generator).argsort(-1)[..., :5]
    p_BLK = torch.softmax(torch.randn((NUM_SEQUENCES, SEQ_LEN, 6), generator=generator) * 2, -1)
    return [
        Batch(
            tokens_BL1[part, :-1],
            labels_BL[part],
            ids_BLK[part].flatten(0, 1),
            p_BLK[part, :, :5].flatten(0, 1),
            p_BLK[part, :, 5].flatten(),
        )
        for part in (slice(i, i + micro_batch) for i in range(0, NUM_SEQUENCES, micro_batch))
    ]


def _train(model, micro_batch: int, objective: Objective, labels: tuple[int, ...] = LABELS, **more: Any) -> _Recorded:
    num_steps = 3
    settings = OptimizationSettings(
        batch_sequences=NUM_SEQUENCES, micro_batch_sequences=micro_batch, clip_norm=0.5, learning_rate=1e-2, **more
    )
    accumulate = NUM_SEQUENCES // micro_batch
    module = _Recorded(model, settings, num_steps, 0.7, 1.0, VOCAB_SIZE, objective, accumulate)
    batches = [batch for seed in range(num_steps) for batch in _step_batches(micro_batch, labels, seed)]
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision=settings.precision,
        max_steps=num_steps,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert len(module.gradients) == num_steps
    return module


@pytest.mark.parametrize("weights", ["equal", "entropy"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_with_unequal_numbers_of_labels_have_the_gradient_of_one_batch(
    make_student, micro_batch: int, weights: Any
) -> None:
    objective = Objective(token_weights=weights)
    whole = _train(make_student(), NUM_SEQUENCES, objective)
    parts = _train(make_student(), micro_batch, objective)
    assert parts.norms == pytest.approx(whole.norms, rel=1e-5)  # float32, summed in another order
    for found, expected in zip(parts.gradients, whole.gradients, strict=True):
        # as above; later steps start from weights that differ so, and AdamW divides by gradients of that size
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_mean_of_the_micro_batches_means_would_be_another_gradient(make_student) -> None:
    """So the test above can fail."""
    objective = Objective()
    whole = _train(make_student(), NUM_SEQUENCES, objective).gradients[0]
    module = DistillationModule(make_student(), OptimizationSettings(), 3, 0.7, 1.0, VOCAB_SIZE, objective)
    losses = [module.loss(batch, 0.7).loss for batch in _step_batches(1, LABELS, 0)]
    torch.stack(losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
    wrong = torch.cat([p.grad.flatten() for p in module.model.parameters()])
    assert float((wrong - whole).norm() / whole.norm()) > 0.1


def test_the_first_steps_gradient_is_that_of_the_mean_over_labels(make_student) -> None:
    module = DistillationModule(make_student(), OptimizationSettings(), 3, 0.7, 1.0, VOCAB_SIZE)
    (batch,) = _step_batches(NUM_SEQUENCES, LABELS, 0)
    result = module.loss(batch, 0.7)
    rows_N = 0.7 * result.kl_N + 0.3 * result.ce_N
    # float32, summed in another order
    assert result.loss.item() == pytest.approx(float(rows_N.sum()) / sum(LABELS), rel=1e-6)


@pytest.mark.parametrize("micro_batch", [2, NUM_SEQUENCES])
def test_a_step_without_labels_has_no_gradient(make_student, micro_batch: int) -> None:
    module = _train(make_student(), micro_batch, Objective(), labels=(0,) * NUM_SEQUENCES)
    assert not any(gradient.any() for gradient in module.gradients)
    assert module.norms == [0.0] * 3


def test_alpha_moves_with_the_steps_and_not_with_the_micro_batches(make_student) -> None:
    module = _train(make_student(), 4, Objective(final_alpha=0.0))
    assert module.alphas == [0.7, 0.7, pytest.approx(0.35), pytest.approx(0.35), 0.0, 0.0]
    assert module.last.kl_N is None, "at alpha 0 there is nothing to compare with the teacher"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lower_precision_keeps_the_gradient_and_the_dtype_of_its_weights(make_student, precision: str) -> None:
    exact = _train(make_student(), 2, Objective()).gradients[0]
    module = _train(make_student(), 2, Objective(), precision=precision)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.model.parameters()} == {dtype}
    found = module.gradients[0].float()
    # bfloat16 has 8 bits: 0.4 % a number, through two layers and back
    assert float((found - exact).norm() / exact.norm()) < 0.05
