"""Measures, while a training runs, the loss on held-out text and how near the student comes to the teacher.

Legend: B sequences, L targets a sequence, N = B x L rows, K ids kept, V vocabulary, H hidden.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning
import torch

from capgap.pipeline.store import Batch
from capgap.pipeline.train.metrics import MetricsFile
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.not_finite import NotFinite
from capgap.pipeline.train.staleness import RatioFigures, ratio_figures
from capgap.pipeline.train.timer import TrainingTimer

_LOG = logging.getLogger("capgap")


@dataclass(frozen=True)
class HeldOutFigures:
    """The figures of one measurement, as means over the labels of held-out sequences.

    Attributes:
        loss: Cross-entropy with the text, in nats/token.
        kl: For a `topk` cache, the divergence that alpha weighs between teacher and student, in nats/token at the
            training's temperature, or forward KL where the cache does not support that divergence. It is comparable
            with `train_kl`. `forward_kl` with the tail as one token is a lower bound of KL(teacher || student). For an
            aligned cache, the sum of the chunks' divergences over the number of labels. None for a `sampled` cache,
            because samples give a biased estimate of the teacher's entropy.
        teacher_ce: For a `sampled` cache, the student's cross-entropy with the teacher's samples, in nats/token. Its
            expectation is the cross-entropy with the teacher's whole distribution: KL(teacher || student) plus the
            teacher's entropy. On the same sequences, two such figures differ as the two KLs do. None for `topk`.
        top1: Top-1 agreement: the share of rows at which student and teacher have the same top-1 token, in [0, 1]. For
            `sampled` the teacher's is the id that was sampled most often, the lower id on a tie. An id of probability p
            is sampled n p times, rounded up or down, so this can differ from the real top-1 token only where two ids
            are less than two samples apart. None for an aligned cache.
        ratio: For text that a student of the run wrote, the importance ratios of this student on it; otherwise None.
    """

    loss: float
    kl: float | None = None
    teacher_ce: float | None = None
    top1: float | None = None
    ratio: RatioFigures | None = None

    def in_words(self) -> str:
        """Return the loss and, where it was measured, the distance from the teacher."""
        words = f"loss {self.loss:.4f} nats/token"
        if self.kl is not None:
            words += f", divergence from the teacher {self.kl:.4f}"
        if self.teacher_ce is not None:
            words += f", cross-entropy with the teacher {self.teacher_ce:.4f}"
        return words


class HeldOut(lightning.Callback):
    """Measures held-out sequences every few steps and at the end, and with `also_before` before the first step.

    The student's distance from the teacher before the first step shows how good its first weights are, and how much
    quality pruning has cost. In metrics.csv that row has the step 0.

    Args:
        file: Receives a row for each measurement.
        watch: Is asked to check all pending losses and gradients before each measurement.
        timer: Counts the time of a measurement as no part of the training.
        batches: Returns the held-out micro-batches for one measurement.
        every_steps: Number of steps from one measurement to the next.
        tokens_per_step: Number of targets in a step.
        also_before: Whether to measure before the first step too.

    Attributes:
        last: The figures of the last measurement after a step; None before the first one.
    """

    def __init__(
        self,
        file: MetricsFile,
        watch: NotFinite,
        timer: TrainingTimer,
        batches: Callable[[], Iterable[Batch]],
        every_steps: int,
        tokens_per_step: int,
        also_before: bool = False,
    ) -> None:
        self._also_before = also_before
        self._file, self._watch, self._timer, self._batches = file, watch, timer, batches
        self._every, self._tokens_per_step, self._last_step = every_steps, tokens_per_step, 0
        self._begun, self._num_measured = time.monotonic(), 0
        self.last: HeldOutFigures | None = None

    @property
    def measured(self) -> tuple[int, float] | None:
        """The step of the last measurement and its cross-entropy with the text in nats/token, equal on every rank."""
        return None if self.last is None else (self._last_step, self.last.loss)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Measure before the first step if asked to; a resumed training has measured the step it begins with."""
        self._last_step, self._begun = trainer.global_step, time.monotonic()
        if trainer.global_step or not self._also_before:
            return
        before = self._measured(0, module)
        if trainer.is_global_zero:
            _LOG.info("before the first step, on held-out text: %s", before.in_words())

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Measure at the interval and at the last step."""
        step = trainer.global_step
        if step == self._last_step or (step % self._every and step != trainer.max_steps):
            return
        self._last_step = step
        self._watch.settle(trainer)
        self.last = self._measured(step, module)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Log how much of the time went to measurements."""
        total_s = max(time.monotonic() - self._begun, 1e-9)
        if trainer.is_global_zero and self._num_measured:
            spent_s = self._timer.excluded_s
            _LOG.info(
                "trained for %.1f s, of which %.1f s (%.0f %%) went to measuring held-out text",
                *(total_s, spent_s, 100 * spent_s / total_s),
            )

    def _measured(self, step: int, module: Any) -> HeldOutFigures:
        before_s = self._timer.excluded_s
        with self._timer.excluded():
            figures = measure(module, self._batches())
        self._num_measured += 1
        self._write(step, figures, self._timer.excluded_s - before_s)
        return figures

    def _write(self, step: int, figures: HeldOutFigures, taken_s: float) -> None:
        ratio = {} if figures.ratio is None else figures.ratio.rounded()
        self._file.add(
            step=step,
            num_tokens=step * self._tokens_per_step,
            validation_loss=round(figures.loss, 6),
            heldout_kl=_rounded(figures.kl),
            heldout_teacher_ce=_rounded(figures.teacher_ce),
            heldout_top1=_rounded(figures.top1),
            heldout_s=round(taken_s, 3),
            **ratio,
        )


@torch.no_grad()
def measure(module: DistillationModule, batches: Iterable[Batch]) -> HeldOutFigures:
    """Measure the student on held-out batches.

    The loss is over the labels of all batches, the figures against the teacher over those of batches with targets.
    """
    was_training = module.training
    module.eval()
    # Over all batches: loss, labels. Over batches with targets: labels, KL, entropy of the targets, top-1 agreements.
    sums_6 = torch.zeros(6, dtype=torch.float64, device=module.device)
    is_sampled = of_chunks = False
    pairs: list[torch.Tensor] = []
    for batch in batches:
        batch = batch.to(module.device)
        has_targets = batch.ids_NK is not None or batch.chunk_left_N is not None
        last = module.loss(batch, alpha=1.0 if has_targets else 0.0)
        counted_N = batch.labels_BL.flatten() >= 0
        sums_6[0] += last.ce_N[counted_N].double().sum()
        sums_6[1] += counted_N.sum()
        if batch.writer_logprobs_N is not None:
            pairs.append(torch.stack([-last.ce_N, batch.writer_logprobs_N])[:, counted_N])
        if has_targets:
            assert last.kl_N is not None
            sums_6[2] += counted_N.sum()
            sums_6[3] += last.kl_N[counted_N].double().sum()
            if batch.chunk_left_N is not None:
                of_chunks = True
                continue
            is_sampled = batch.tail_N is None
            sums_6[4] += entropies(batch)[counted_N].sum()
            sums_6[5] += _agrees(module, batch)[counted_N].sum()
    module.train(was_training)
    loss, count, count_with, kl, entropy, agreements = sums_6.tolist()
    loss /= max(count, 1)
    ratio = None
    if pairs and count:
        now_N, writer_N = torch.cat(pairs, 1)
        ratio = ratio_figures(now_N, writer_N, module.clip)
    if not count_with:
        return HeldOutFigures(loss, ratio=ratio)
    if is_sampled:
        return HeldOutFigures(loss, None, (kl + entropy) / count_with, agreements / count_with, ratio)
    return HeldOutFigures(loss, kl / count_with, None, None if of_chunks else agreements / count_with, ratio)


def entropies(batch: Batch) -> torch.Tensor:
    """Return the entropy of the kept ids' probabilities in each row [N], float64, in nats."""
    assert batch.weights_NK is not None
    weights_NK = batch.weights_NK.double()
    return -torch.xlogy(weights_NK, weights_NK).sum(dim=1)


def _agrees(module: DistillationModule, batch: Batch) -> torch.Tensor:
    assert batch.ids_NK is not None and batch.weights_NK is not None and module.top_N is not None
    return module.top_N == batch.ids_NK.gather(1, batch.weights_NK.argmax(dim=1, keepdim=True))[:, 0]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
