"""Losses that capgap does not have, tried on the models and caches of benchmarks/quality.py: a line of results each.

python benchmarks/estimators.py --run smol

Everything but the loss is that of the arm with which each is paired, whose line benchmarks/quality.py keeps.

Legend: N rows, H hidden, V vocabulary, K top-k tokens, B sequences, C the top-k tokens and the rest as one.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import torch
from machine import RESULTS
from quality import begun_bench
from quality_arms import ONLINE, RUNS, arms
from quality_page import kl_of
from result_lines import Results
from torch import Tensor

from capgap.kernels.sparse_kl import SparseKl, linear_sparse_kl
from capgap.pipeline.store import Batch
from capgap.pipeline.train import fit as fit_of_product
from capgap.pipeline.train.module import DistillationModule, _targets
from capgap.pipeline.train.online import HeadWeights, OnlineModule, full_divergence


def main() -> None:
    """Train what is not in the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", choices=list(RUNS), default="smol", help="whose models and text are taken")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-seed", type=int, help="of them this one alone: a process each may share the work")
    parser.add_argument("--work", type=Path, help="as for benchmarks/quality.py, whose caches are taken")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the lines")
    parser.add_argument("--smoke", action="store_true", help="at the smallest size, to see that it works")
    flags = parser.parse_args()
    bench = begun_bench(flags.work, flags.run, flags.smoke)
    results = Results(flags.results / f"estimators-{flags.run}.jsonl")
    with bench.teacher_on_heldout() as heldout:
        # every seed of one loss before the next one is begun
        for name, seed in itertools.product(flags.arms, range(flags.seeds)):
            if flags.only_seed in (None, seed) and not results.has(name, seed, bench.about):
                module, paired = ARMS[name]
                with trained_by(module):
                    line = bench.train(next(arm for arm in arms() if arm.name == paired), seed, heldout)
                results.add(line | {"arm": name, "paired_with": paired})
                print(name, seed, kl_of(line), line["heldout_loss"], flush=True)


@contextmanager
def trained_by(module: type[DistillationModule]) -> Iterator[None]:
    """Trainings within have this module in the place of the product's with the same arguments."""
    replaced = "OnlineModule" if issubclass(module, OnlineModule) else "DistillationModule"
    own = getattr(fit_of_product, replaced)
    setattr(fit_of_product, replaced, module)
    try:
        yield
    finally:
        setattr(fit_of_product, replaced, own)


class StudentEntropy(DistillationModule):
    """Each row counts by the entropy of the student's own distribution, as it is at that step."""

    def _loss_of(self, hidden_BLH: Tensor, batch: Batch, alpha: float) -> SparseKl:
        """As there, with these weights in training."""
        if not self.training:
            return super()._loss_of(hidden_BLH, batch, alpha)
        student = self._head.inputs(hidden_BLH)
        return linear_sparse_kl(
            **student,
            targets=_targets(batch),
            labels_N=batch.labels_BL.flatten(),
            alpha=alpha,
            row_weights_N=self.weights(self.entropies(_logits(student, self._vocab_size).detach())),
            vocab_size=self._vocab_size,
        )

    @staticmethod
    def entropies(logits_NV: Tensor) -> Tensor:
        """Of each row, nats."""
        return torch.special.entr(torch.softmax(logits_NV, -1)).sum(-1)

    @staticmethod
    def weights(entropies_N: Tensor) -> Tensor:
        """What a row counts."""
        return entropies_N


class HighestStudentEntropy(StudentEntropy):
    """The fifth of the rows with the highest entropy counts alone, as in SE-KD (arXiv 2602.01395)."""

    @staticmethod
    def weights(entropies_N: Tensor) -> Tensor:
        """1 or 0."""
        return (entropies_N >= entropies_N.quantile(0.8)).to(entropies_N.dtype)


class TailAware(OnlineModule):
    """The divergence of arXiv 2602.20816: KL = KL1 + a KL2, with beta over the sequence's mean a as KL2's factor.

    KL1 is over the K top-k tokens and the rest as one, a the teacher's rest, KL2 between both rests, made to sum to 1.
    """

    top_k, beta = 10, 2.0

    def _loss_of(self, hidden_BLH: Tensor, batch: Batch, alpha: float) -> SparseKl:
        """As there; the cross-entropy has no part in it."""
        if not self.training:
            return super()._loss_of(hidden_BLH, batch, alpha)
        logq_NV = torch.log_softmax(_logits(self._head.inputs(hidden_BLH), self._vocab_size), -1)
        with torch.no_grad(), torch.autocast(hidden_BLH.device.type, enabled=False):
            teacher_NV = self._teacher_head.exact_logits(self._teacher_hidden(batch), self._vocab_size).float()
            logp_NV = torch.log_softmax(teacher_NV, -1)
        loss_N = tail_aware(logp_NV, logq_NV, len(batch.labels_BL), self.top_k, self.beta)
        return SparseKl(loss_N.mean(), loss_N.detach(), torch.zeros_like(loss_N))


def tail_aware(logp_NV: Tensor, logq_NV: Tensor, num_sequences: int, top_k: int, beta: float) -> Tensor:
    """The loss of each row; a KL where beta is each sequence's mean of the teacher's rest."""
    ids_NK = logp_NV.topk(top_k, dim=-1).indices
    logp_NC, logq_NC = (_with_rest(one_NV, ids_NK) for one_NV in (logp_NV, logq_NV))
    first_N = full_divergence(logp_NC, logq_NC, "forward_kl", 0.5)
    rest_BL = logp_NC[:, -1].exp().view(num_sequences, -1)
    mean_N = rest_BL.mean(1, keepdim=True).expand_as(rest_BL).flatten()
    return first_N + beta / mean_N * (full_divergence(logp_NV, logq_NV, "forward_kl", 0.5) - first_N)


def _with_rest(logs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The logprobs of these tokens, and that of all others together in the last column."""
    others_NV = logs_NV.scatter(1, ids_NK, float("-inf"))
    return torch.cat([logs_NV.gather(1, ids_NK), others_NV.logsumexp(-1, keepdim=True)], 1)


def _logits(student: dict[str, Tensor], vocab_size: int) -> Tensor:
    head = HeadWeights(student["weight_VH"], student["bias_V"], student["softcap"])  # type: ignore[arg-type]
    return head.logits(student["hidden_NH"], vocab_size)


# By name, the module, and the arm that is the same but for it.
ARMS: dict[str, tuple[type[DistillationModule], str]] = {
    "sampled, n = 50, student entropy": (StudentEntropy, "sampled, n = 50, systematic"),
    "online, tail-aware": (TailAware, ONLINE),
    "sampled, n = 50, highest fifth of student entropy": (HighestStudentEntropy, "sampled, n = 50, systematic"),
}


if __name__ == "__main__":
    main()
