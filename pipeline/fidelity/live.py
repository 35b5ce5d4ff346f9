"""Scores a few of the cache's sequences with the teacher, for exact figures where the cache alone gives bounds.

Legend: N rows (labelled positions), V real vocabulary, Q numbers of ids.
"""

from __future__ import annotations

import numpy as np
import torch

from capgap.pipeline.eval.calibration import CalibrationError
from capgap.pipeline.eval.measure import score
from capgap.pipeline.fidelity.rows import exact_sampling_errors, ladder
from capgap.pipeline.models.load import load_model
from capgap.pipeline.models.text import RunText
from capgap.pipeline.models.tokenizers import load_tokenizer, require_same_tokenizer
from capgap.pipeline.stage.context import StageInput
from capgap.schemas.facts import CacheFacts
from capgap.schemas.fidelity import KeptMass, LiveFigures, SamplingError
from capgap.schemas.records import Sequences

_BATCH_SEQUENCES = 4


def require_tokenizer_of(cache: StageInput, teacher: str, trust_remote_code: bool) -> None:
    """Raise MismatchError unless the teacher's tokenizer encodes every text to the same ids as the cache's."""
    found = load_tokenizer(teacher, trust_remote_code)
    require_same_tokenizer(RunText(cache).tokenizer(), "the cache", found, f"--teacher {teacher}")


def live_figures(
    sequences: Sequences, facts: CacheFacts, teacher: str, nums: set[int], device: str, trust_remote_code: bool
) -> LiveFigures:
    """Score sequences with the teacher under the cache's context rule and at its temperature.

    Args:
        sequences: The sequences, each with at least one label.
        facts: The facts about the cache.
        teacher: Folder or id of the teacher.
        nums: Numbers of kept ids or samples. Figures are given for these and for further numbers, up to ten times the
            largest.
        device: The device, `cpu` or such as `cuda:0`, whose lease the caller holds.
        trust_remote_code: Whether to run code that comes with the teacher.

    Raises:
        InputError: The teacher cannot be loaded, or its logits are not finite.
    """
    mask_BL = sequences.mask_BL1[:, 1:]
    labels_N = torch.from_numpy(sequences.tokens_BL1[:, 1:][mask_BL].astype(np.int64))
    sums = LiveSums(labels_N, facts.temperature, facts.tokenizer.vocab_size, nums)
    model = load_model(teacher, device, "fast", trust_remote_code)
    score(
        model,
        sequences,
        name=teacher,
        vocab_size=facts.tokenizer.vocab_size,
        batch_sequences=_BATCH_SEQUENCES,
        context=facts.context,
        visit=sums.add,
        num_visited=len(sequences),
    )
    return sums.result()


class LiveSums:
    """Adds up figures of full distributions, which must be added in the order of their labels.

    Args:
        labels_N: The labels of all rows, int64.
        temperature: The temperature of the figures.
        vocab_size: Size of the real vocabulary.
        nums: Numbers of kept ids or samples for which figures are wanted.
    """

    def __init__(self, labels_N: torch.Tensor, temperature: float, vocab_size: int, nums: set[int]) -> None:
        self._labels_N, self._temperature = labels_N, temperature
        most = min(10 * max(nums), vocab_size)
        self._nums_Q = tuple(sorted({*ladder(most), *(num for num in nums if num < most)}))
        self._mass_Q, self._kl_Q = np.zeros(len(self._nums_Q)), np.zeros(len(self._nums_Q))
        self._errors_Q2 = np.zeros((len(self._nums_Q), 2))
        self._entropy, self._nats, self._num_rows = 0.0, 0.0, 0
        self._calibration = CalibrationError(1)

    def add(self, logprobs_NV: torch.Tensor) -> None:
        """Add rows of float32 logprobs at temperature 1."""
        logp_NV = (logprobs_NV.double() / self._temperature).log_softmax(-1).cpu()
        labels_N = self._labels_N[self._num_rows : self._num_rows + len(logp_NV)]
        self._num_rows += len(logp_NV)
        p_NV = logp_NV.exp()
        self._entropy += float(torch.special.entr(p_NV).sum())
        self._nats -= float(logp_NV.gather(1, labels_N[:, None]).sum())
        kept = p_NV.topk(self._nums_Q[-1])
        self._calibration.count(0, kept.values[:, 0], kept.indices[:, 0] == labels_N)
        mass_NK = kept.values.cumsum(dim=1).clamp(max=1.0)
        for place, num in enumerate(self._nums_Q):
            self._mass_Q[place] += float(mass_NK[:, num - 1].sum())
            self._kl_Q[place] -= float(mass_NK[:, num - 1].log().sum())
        self._errors_Q2 += np.array(list(exact_sampling_errors(p_NV, self._nums_Q)))

    def result(self) -> LiveFigures:
        """Return the means over the rows so far, of which there must be at least one."""
        count = self._num_rows
        return LiveFigures(
            temperature=self._temperature,
            num_rows=count,
            entropy=self._entropy / count,
            label_loss=self._nats / count,
            ece=self._calibration.value(count),
            kept=tuple(
                KeptMass(num_ids=num, mass=float(mass / count), truncation_kl=max(float(kl / count), 0.0))
                for num, mass, kl in zip(self._nums_Q, self._mass_Q, self._kl_Q, strict=True)
            ),
            sampling_errors=tuple(
                SamplingError(
                    num_samples=num, independent=float(independent / count), systematic=float(systematic / count)
                )
                for num, (independent, systematic) in zip(self._nums_Q, self._errors_Q2, strict=True)
            ),
        )
