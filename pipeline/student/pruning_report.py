"""Reports the parts that pruning removed, and its cost before any training, for `prune.json` and the manifest.

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
# Rows of the teacher's whole distributions, at 4 bytes an id, that are kept in memory until the student is measured.
# There are more only if a single sequence has more rows.
_KL_ROWS = 1024


class Nearness:
    """Measures the mean loss of the teacher and then of the student on held-out sequences, and the KL between them.

    Args:
        sequences: The held-out sequences.
        vocab_size: Size of the real vocabulary.
        context: The context rule.
    """

    def __init__(self, sequences: Sequences, vocab_size: int, context: ContextRule) -> None:
        self._sequences, self._vocab_size, self._context = sequences, vocab_size, context
        self._labels_S = num_labels(sequences)
        # Only whole sequences are compared, and at least the first one.
        self._num_compared = max(1, int((self._labels_S.cumsum() <= _KL_ROWS).sum()))
        self._teacher: list[Tensor] = []

    @property
    def num_compared(self) -> int:
        """Number of sequences over which the KL is computed."""
        return self._num_compared

    def teacher_loss(self, model: PreTrainedModel) -> float:
        """Return the teacher's mean loss in nats/token. The model's head computes in float32 from then on.

        Raises:
            InputError: A loss is not a finite number.
        """
        self._teacher = []
        return self._loss(model, "the teacher", lambda logprobs_NV: self._teacher.append(logprobs_NV.cpu()))

    def student_loss(self, model: PreTrainedModel) -> tuple[float, float]:
        """Return the student's mean loss and its KL(teacher || student) on the compared sequences, in nats/token.

        `teacher_loss` must have been called before. The model's head computes in float32 from then on.

        Raises:
            InputError: A loss is not a finite number.
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
    """Write the kept parts by layer of the student, the scores of all parts of the teacher, and the figures."""
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
    """Return scores as nested lists, rounded to six significant digits, which are enough to compare importance."""
    if scores.ndim > 1:
        return [_rounded(part) for part in scores]
    return [float(f"{value:.6g}") for value in scores.tolist()]
