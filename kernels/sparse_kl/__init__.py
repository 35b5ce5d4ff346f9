"""The student's loss: forward KL to a sparse target mixed with cross-entropy, straight from hidden states.

    hidden [N, H], head [V, H], targets [N, K], labels [N]
        -> loss = sum_i w_i (alpha T^2 KL_i + (1 - alpha) CE_i) / sum_i w_i     and its gradients
           logits [N, V] never stand in memory at once

`reference.py` is the plain dense form and the truth for tests; `torch_op.py` is what is exported here. README.md
derives the gradient. Other implementations of the same signature may stand beside these two.
"""

from capgap.kernels.sparse_kl.targets import SparseKl, SparseTargets
from capgap.kernels.sparse_kl.torch_op import linear_sparse_kl

__all__ = ["SparseKl", "SparseTargets", "linear_sparse_kl"]
