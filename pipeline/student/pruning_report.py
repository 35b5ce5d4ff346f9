"""What pruning took away, and what it cost before any training: `prune.json` and the manifest's totals.

Legend: N labelled positions, V real vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capgap.pipeline.eval.heldout import num_labels
from capgap.pipeline.eval.measure import score
from capgap.pipeline.student.kept import KeptParts, Scores
from capgap.schemas.records import Sequences
from capgap.schemas.run_corpus import ContextRule

REPORT_NAME = "prune.json"
# Rows of the teacher's whole distributions that wait in memory for the student, 4 bytes an id; more only where one
# sequence has more.
_KL_ROWS = 1024


class Nearness:
    """The mean loss of one model after the other over held-out sequences, and the KL between the two.

    Args:
        sequences: held-out ones.
        vocab_size: real ids.
        context: what a model sees before a token.
    """

    def __init__(self, sequences: Sequences, vocab_size: int, context: ContextRule) -> None:
        self._sequences, self._vocab_size, self._context = sequences, vocab_size, context
        self._labels_S = num_labels(sequences)
        # whole sequences, and the first in any case
        self._num_compared = max(1, int((self._labels_S.cumsum() <= _KL_ROWS).sum()))
        self._teacher: list[Tensor] = []

    @property
    def num_compared(self) -> int:
        """Sequences behind the KL."""
        return self._num_compared

    def teacher_loss(self, model: PreTrainedModel) -> float:
        """Nats per label. The model's head is made float32 by it.

        Raises:
            InputError: a loss is not a number.
        """
        self._teacher = []
        return self._loss(model, "the teacher", lambda logprobs_NV: self._teacher.append(logprobs_NV.cpu()))

    def student_loss(self, model: PreTrainedModel) -> tuple[float, float]:
        """Nats per label, and KL(teacher || student), nats per label of the compared sequences.

        Raises:
            InputError: a loss is not a number.
        """
        waiting, nats, num_rows = iter(self._teacher), 0.0, 0

        def compare(logprobs_NV: Tensor) -> None:
            nonlocal nats, num_rows
            theirs_NV = next(waiting).to(logprobs_NV.device)
            nats += float((theirs_NV.exp() * (theirs_NV - logprobs_NV)).sum(dtype=torch.float64))
            num_rows += len(logprobs_NV)

        return self._loss(model, "the pruned student", compare), nats / num_rows

    def _loss(self, model: PreTrainedModel, name: str, visit: Any) -> float:
        nats_S = score(
            model,
            self._sequences,
            name=name,
            vocab_size=self._vocab_size,
            batch_sequences=1,
            context=self._context,
            visit=visit,
            num_visited=self._num_compared,
        )
        return float(nats_S.sum() / self._labels_S.sum())


def write_report(folder: Path, kept: KeptParts, scores: Scores, figures: dict[str, Any]) -> None:
    """Which parts stayed, by layer of the student, the score of every part of the teacher, and the figures."""
    indices = {
        "layers": kept.layers.tolist(),
        "hidden": kept.hidden.tolist(),
        "key_value_heads": [part.tolist() for part in kept.groups],
        "heads": [part.tolist() for part in kept.heads],
        "neurons": [part.tolist() for part in kept.neurons],
    }
    given = {
        "layers": _rounded(scores.layers_M),
        "hidden": _rounded(scores.hidden_H),
        "heads": _rounded(scores.heads_MGQ.flatten(1)),
        "neurons": _rounded(scores.neurons_MF),
    }
    (folder / REPORT_NAME).write_text(json.dumps({"figures": figures, "kept": indices, "scores": given}) + "\n")


def _rounded(scores: Tensor) -> Any:
    """Scores with six digits: further ones do not change what is more important."""
    if scores.ndim > 1:
        return [_rounded(part) for part in scores]
    return [float(f"{value:.6g}") for value in scores.tolist()]
