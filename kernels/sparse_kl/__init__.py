"""The student's loss: a divergence from a sparse target mixed with cross-entropy, computed from hidden states.

    hidden [N, H], head [V, H], targets [N, K], labels [N]
        -> loss = sum_i w_i (alpha T^2 KL_i + (1 - alpha) CE_i) / sum_i w_i     and its gradients
           the logits [N, V] are never in memory all at once

`linear_label_logprobs` returns each label's logprob, for losses of spans. `reference.py` is the plain dense reference
for tests. `op.py` is the form that is exported here, and `vocab_parallel.py` its form for a head that is split over
processes. README.md derives the gradient.
"""

from capgap.kernels.sparse_kl.chunk_kl import ChunkDivergence, chunk_kl, chunk_sums
from capgap.kernels.sparse_kl.divergence import Divergence, Recording, Tail, check_pair
from capgap.kernels.sparse_kl.label_logprobs import linear_label_logprobs
from capgap.kernels.sparse_kl.op import linear_sparse_kl
from capgap.kernels.sparse_kl.policy_gradient import importance_ratio, policy_gradient
from capgap.kernels.sparse_kl.targets import SparseKl, SparseTargets
from capgap.kernels.sparse_kl.vocab_parallel import vocab_parallel_sparse_kl

__all__ = [
    "ChunkDivergence",
    "Divergence",
    "Recording",
    "SparseKl",
    "SparseTargets",
    "Tail",
    "check_pair",
    "chunk_kl",
    "chunk_sums",
    "importance_ratio",
    "linear_label_logprobs",
    "linear_sparse_kl",
    "policy_gradient",
    "vocab_parallel_sparse_kl",
]
