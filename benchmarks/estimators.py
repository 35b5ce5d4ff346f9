"""Try losses that capgap does not have on the models and caches of benchmarks/quality.py, with a line of results each.

python benchmarks/estimators.py --run smol

Each loss is paired with an arm of benchmarks/quality.py, which keeps that arm's line; all else is the same as there.

Legend: N rows, L targets, H hidden, V vocabulary, K top-k tokens, B sequences, C the top-k tokens and the rest as one.
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
    """Run the trainings that the results lack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", choices=list(RUNS), default="smol", help="the run whose models and text are used")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-seed", type=int, help="train this seed only, so that several processes share the work")
    parser.add_argument("--work", type=Path, help="work folder of benchmarks/quality.py, whose caches are used")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the lines")
    parser.add_argument("--smoke", action="store_true", help="run at the smallest size, to check that everything works")
    flags = parser.parse_args()
    bench = begun_bench(flags.work, flags.run, flags.smoke)
    results = Results(flags.results / f"estimators-{flags.run}.jsonl")
    with bench.teacher_on_heldout() as heldout:
        # all seeds of one loss come before the next loss
        for name, seed in itertools.product(flags.arms, range(flags.seeds)):
            if flags.only_seed in (None, seed) and not results.has(name, seed, bench.about):
                module, paired = ARMS[name]
                with trained_by(module):
                    line = bench.train(next(arm for arm in arms() if arm.name == paired), seed, heldout)
                results.add(line | {"arm": name, "paired_with": paired})
                print(name, seed, kl_of(line), line["heldout_loss"], flush=True)


@contextmanager
def trained_by(module: type[DistillationModule]) -> Iterator[None]:
    """Within the context, trainings use this module instead of capgap's module with the same arguments."""
    replaced = "OnlineModule" if issubclass(module, OnlineModule) else "DistillationModule"
    own = getattr(fit_of_product, replaced)
    setattr(fit_of_product, replaced, module)
    try:
        yield
    finally:
        setattr(fit_of_product, replaced, own)


class StudentEntropy(DistillationModule):
    """Weights each row by the entropy of the student's own distribution at the current step."""

    def _loss_of(self, hidden_BLH: Tensor, batch: Batch, alpha: float) -> SparseKl:
        """Return the usual loss, with rows weighted by entropy in training."""
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
        """Return the entropy of each row, in nats [N]."""
        return torch.special.entr(torch.softmax(logits_NV, -1)).sum(-1)

    @staticmethod
    def weights(entropies_N: Tensor) -> Tensor:
        """Return the weight of each row [N]."""
        return entropies_N


class HighestStudentEntropy(StudentEntropy):
    """Only counts the fifth of the rows with the highest entropy, as in SE-KD (arXiv 2602.01395)."""

    @staticmethod
    def weights(entropies_N: Tensor) -> Tensor:
        """Return a weight of 1 for the highest fifth of entropies, and 0 for the others."""
        return (entropies_N >= entropies_N.quantile(0.8)).to(entropies_N.dtype)


class TailAware(OnlineModule):
    """The divergence of arXiv 2602.20816, which reweights the second term of KL = KL1 + a KL2.

    KL1 takes the top-k tokens and all others as one; a is the teacher's probability of all others; KL2 is the
    divergence between the renormalised distributions over all others. The factor beta / (mean of a over the sequence)
    weights a KL2.
    """

    top_k, beta = 10, 2.0

    def _loss_of(self, hidden_BLH: Tensor, batch: Batch, alpha: float) -> SparseKl:
        """Return the tail-aware loss in training, without cross-entropy, and the usual loss otherwise."""
        if not self.training:
            return super()._loss_of(hidden_BLH, batch, alpha)
        logq_NV = torch.log_softmax(_logits(self._head.inputs(hidden_BLH), self._vocab_size), -1)
        with torch.no_grad(), torch.autocast(hidden_BLH.device.type, enabled=False):
            teacher_NV = self._teacher_head.exact_logits(self._teacher_hidden(batch), self._vocab_size).float()
            logp_NV = torch.log_softmax(teacher_NV, -1)
        loss_N = tail_aware(logp_NV, logq_NV, len(batch.labels_BL), self.top_k, self.beta)
        return SparseKl(loss_N.mean(), loss_N.detach(), torch.zeros_like(loss_N))


def tail_aware(logp_NV: Tensor, logq_NV: Tensor, num_sequences: int, top_k: int, beta: float) -> Tensor:
    """Return the loss of each row [N], in nats; it is the KL where beta equals the sequence's mean of a."""
    ids_NK = logp_NV.topk(top_k, dim=-1).indices
    logp_NC, logq_NC = (_with_rest(one_NV, ids_NK) for one_NV in (logp_NV, logq_NV))
    first_N = full_divergence(logp_NC, logq_NC, "forward_kl", 0.5)
    rest_BL = logp_NC[:, -1].exp().view(num_sequences, -1)
    mean_N = rest_BL.mean(1, keepdim=True).expand_as(rest_BL).flatten()
    return first_N + beta / mean_N * (full_divergence(logp_NV, logq_NV, "forward_kl", 0.5) - first_N)


def _with_rest(logs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Return the logprobs of these tokens, and the logprob of all others together in the last column [N, C]."""
    others_NV = logs_NV.scatter(1, ids_NK, float("-inf"))
    return torch.cat([logs_NV.gather(1, ids_NK), others_NV.logsumexp(-1, keepdim=True)], 1)


def _logits(student: dict[str, Tensor], vocab_size: int) -> Tensor:
    head = HeadWeights(student["weight_VH"], student["bias_V"], student["softcap"])  # type: ignore[arg-type]
    return head.logits(student["hidden_NH"], vocab_size)


# By name: the module, and the arm that it is paired with.
ARMS: dict[str, tuple[type[DistillationModule], str]] = {
    "sampled, n = 50, student entropy": (StudentEntropy, "sampled, n = 50, systematic"),
    "online, tail-aware": (TailAware, ONLINE),
    "sampled, n = 50, highest fifth of student entropy": (HighestStudentEntropy, "sampled, n = 50, systematic"),
}


if __name__ == "__main__":
    main()
