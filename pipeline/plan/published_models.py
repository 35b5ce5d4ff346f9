"""The models in the table of the law of capacity gap's paper, with their compute and scores on six benchmarks.

Source: table of results in the repository of MiniMA, of arXiv:2311.07052. Compute is 6 N D, for MiniMA-3B 6 N_S D + 2
N_T D: it counts neither a teacher's own training nor its adaptation. `docs/law.md` lists which figures are reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass

from capgap.pipeline.plan.costs import non_dominated

SOURCE = "Zhang et al., ACL 2025, arXiv:2311.07052"

SHOTS = {"mmlu": 5, "ceval": 5, "drop": 3, "humaneval": 0, "bbh": 3, "gsm8k": 8}
"""Number of solved examples before each question, for each of the six benchmarks."""

_TFLOPS = 1e12


@dataclass(frozen=True)
class PublishedModel:
    """A row of the paper's table.

    Attributes:
        name: The name in the table.
        flops: Floating-point operations of its training; the table has them in units of 1e9 TFLOPs.
        scores: Scores in per cent, in the order of `SHOTS`.
        doubt: What is wrong with the row, in words; empty where no fault is known.
    """

    name: str
    flops: float
    scores: tuple[float, ...]
    doubt: str = ""

    @property
    def mean(self) -> float:
        """Unweighted mean of the six scores, in per cent."""
        return sum(self.scores) / len(self.scores)


def _row(name: str, e9_tflops: float, *scores: float, doubt: str = "") -> PublishedModel:
    assert len(scores) == len(SHOTS)
    return PublishedModel(name, e9_tflops * 1e9 * _TFLOPS, scores, doubt)


MODELS = (
    _row("ShearedLLaMA-2.7B", 0.8, 26.97, 22.88, 19.98, 4.88, 30.48, 3.56),
    _row("MiniMA-3B", 4.0, 28.51, 28.23, 22.50, 10.98, 31.61, 8.11),
    _row("MiniChat-3B", 4.0, 38.40, 36.48, 22.58, 18.29, 31.36, 29.72),
    _row("MiniMA-2-1B", 6.3, 31.34, 34.92, 20.08, 10.37, 31.16, 7.28),
    _row("BTLM-3B", 11.3, 27.20, 26.00, 17.84, 10.98, 30.87, 4.55),
    _row("MiniMA-2-3B", 13.4, 40.14, 44.65, 23.10, 14.63, 31.43, 8.87),
    _row("MiniChat-2-3B", 13.4, 46.17, 43.91, 30.26, 22.56, 34.95, 38.13),
    _row("Qwen-1.8B", 23.8, 44.05, 54.75, 12.97, 14.02, 30.80, 22.97),
    _row("StableLM-3B", 72.0, 44.75, 31.05, 22.35, 15.85, 32.59, 10.99),
    _row("LLaMA-2-7B", 84.0, 46.00, 34.40, 31.57, 12.80, 32.02, 14.10),
    _row(
        "Phi-2-2.8B",
        159.9,
        56.74,
        34.03,
        30.74,
        46.95,
        44.13,
        55.42,
        doubt="2.7B parameters and 1.4T tokens give a seventh of the compute that is printed",
    ),
)


def not_dominated() -> tuple[PublishedModel, ...]:
    """Return the models that no other model beats in cost and mean score together, by rising cost."""
    best = non_dominated([model.flops for model in MODELS], [-model.mean for model in MODELS])
    return tuple(sorted((m for m, is_on in zip(MODELS, best, strict=True) if is_on), key=lambda model: model.flops))
