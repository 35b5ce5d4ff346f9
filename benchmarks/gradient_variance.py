"""How much variance a recording adds to the student's gradient, compared with the variance between batches.

python benchmarks/gradient_variance.py --run smol      on the models of benchmarks/quality.py, and with its caches
python benchmarks/gradient_variance.py --smoke         the same at the smallest size, to check that it works

Nothing is trained. For the untrained student and each of its first batches, the gradient from every recording is
compared with the gradient from the teacher's whole distributions on the same batch. The mean of the differences is the
recording's bias, and their spread is the variance that it adds. Both are given as shares of the variance between
batches of the gradient from the whole distributions. Where benchmarks/quality.py has trained with a recording, its
share of the gain in KL is added, with the rank correlation between error and gain.

Legend: P parameters.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import torch
from machine import RESULTS, keep
from quality import Bench, begun_bench
from quality_arms import NUM_FIRST, RUNS, Arm, arms
from quality_page import kl_of, shares
from result_lines import Results
from transformers import PreTrainedModel

from capgap.pipeline.store import LoaderSettings, SequenceLoader
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.objective import Objective
from capgap.pipeline.train.online import OnlineModule


def main() -> None:
    """Measure, print the figures, and write them to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", choices=list(RUNS), default="demo")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument(
        "--arms", nargs="+", metavar="NAME", help="recordings; default: those that the project's goal compares"
    )
    parser.add_argument("--work", type=Path, help="work folder of benchmarks/quality.py, whose caches are used")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--smoke", action="store_true", help="run at the smallest size, to check that everything works")
    flags = parser.parse_args()
    bench = begun_bench(flags.work, flags.run, flags.smoke)
    lines = Results(flags.results / f"quality-{flags.run}.jsonl").lines
    trained = [line for line in lines if line["about"] == bench.about]
    figures = measure(bench, chosen(flags.arms), 4 if flags.smoke else flags.batches)
    for row in figures["recordings"]:
        found = shares(trained, row["recording"], kl_of)
        row["share_of_kl_gain"] = round(statistics.mean(found), 4) if found else None
    pairs = [(row["error"], row["share_of_kl_gain"]) for row in figures["recordings"] if row["share_of_kl_gain"]]
    figures["rank_correlation"] = _rank_correlation(pairs)
    print(f"rank correlation of the error with the share of the gain in KL: {figures['rank_correlation']}")
    print(keep(f"gradient-variance-{flags.run}", "cpu", figures, flags.results))


def chosen(names: list[str] | None) -> list[Arm]:
    """Return the arms of these names (by default the first ones of the table), and online distillation."""
    first = [arm.name for arm in arms()[:NUM_FIRST]]
    return [arm for arm in arms() if arm.alpha == 1 and (arm.online or arm.name in (names or first))]


def measure(bench: Bench, arms_tried: list[Arm], num_batches: int) -> dict[str, Any]:
    """Return every recording's added variance, bias and error, as shares of the variance of one batch's gradient."""
    student = bench.student(0)
    whole = Gradients(bench, student, next(arm for arm in arms_tried if arm.online))
    recordings = {arm.name: Gradients(bench, student, arm) for arm in arms_tried if not arm.online}
    sums = {name: Differences() for name in recordings}
    exact = Differences()
    for number in range(num_batches):
        exact_P = whole.next()
        exact.add(exact_P)
        for name, gradients in recordings.items():
            sums[name].add(gradients.next() - exact_P)
        print(f"batch {number + 1} of {num_batches}", flush=True)
    rows = []
    for name, differences in sums.items():
        row = {
            "recording": name,
            "added_variance": round(differences.variance / exact.variance, 5),
            "bias": round(differences.squared_mean / exact.variance, 5),
            "error": round(differences.mean_square / exact.variance, 5),
        }
        print(row, flush=True)
        rows.append(row)
    return {
        "about": bench.about,
        "num_batches": num_batches,
        "squared_mean_gradient": round(exact.squared_mean / exact.variance, 5),
        "recordings": rows,
    }


class Gradients:
    """Computes the untrained student's gradient on one batch after another, as a vector [P]."""

    def __init__(self, bench: Bench, student: PreTrainedModel, arm: Arm) -> None:
        reader, settings = bench.reader(arm), bench.settings
        arguments = (student, settings, 1, arm.alpha, 1.0, reader.codec.vocab_size, Objective(tail=arm.tail))
        self._module = (
            OnlineModule(*arguments, teacher=bench.teacher()) if arm.online else DistillationModule(*arguments)
        )
        self._module.train()
        self._batches = iter(SequenceLoader(reader, LoaderSettings(settings.batch_sequences, 0)))

    def next(self) -> torch.Tensor:
        """Return the gradient of the next batch; all recordings see the batches in the same order."""
        self._module.model.zero_grad()
        self._module.loss(next(self._batches), 1.0).loss.backward()
        return torch.cat([one.grad.flatten() for one in self._module.model.parameters() if one.grad is not None])


@dataclass
class Differences:
    """Moments of a series of vectors, from running sums: the vectors themselves are not kept."""

    number: int = 0
    sum_P: torch.Tensor | None = None
    sum_of_squares: float = 0.0

    def add(self, vector_P: torch.Tensor) -> None:
        """Add one vector."""
        self.number += 1
        self.sum_P = vector_P.clone() if self.sum_P is None else self.sum_P.add_(vector_P)
        self.sum_of_squares += float(vector_P.double().square().sum())

    @property
    def mean_square(self) -> float:
        """Mean squared length of the vectors."""
        return self.sum_of_squares / self.number

    @property
    def variance(self) -> float:
        """Unbiased estimate of the mean squared distance from the mean."""
        return (self.mean_square - self._squared_length_of_mean) * self.number / (self.number - 1)

    @property
    def squared_mean(self) -> float:
        """Unbiased estimate of the squared length of the mean; it may be below 0."""
        return self._squared_length_of_mean - self.variance / self.number

    @property
    def _squared_length_of_mean(self) -> float:
        assert self.sum_P is not None
        return float((self.sum_P.double() / self.number).square().sum())


def _rank_correlation(pairs: list[tuple[float, float]]) -> float | None:
    """Return Spearman's rank correlation; None for fewer than three pairs."""
    if len(pairs) < 3:
        return None
    ranks = [[sorted(column).index(value) for value in column] for column in zip(*pairs, strict=True)]
    return round(statistics.correlation(*ranks), 3)


if __name__ == "__main__":
    main()
