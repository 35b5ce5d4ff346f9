"""One of two gloo processes: python two_processes.py RANK FOLDER. Leaves its results in FOLDER/RANK.pt."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl, vocab_parallel_sparse_kl

NUM_ROWS = 6000  # two thirds of them, in float64, are two chunks of a workspace of 1 MiB
VOCAB_SIZE, PADDED = 75, 80
CASES = {
    f"{recording} {divergence} {tail} T={temperature} {dtype} softcap={softcap} part={first_part}": (
        recording,
        {"divergence": divergence, "tail": tail, "temperature": temperature, "softcap": softcap},
        getattr(torch, dtype),
        first_part,
    )
    for recording, divergence, tail, temperature, dtype, softcap, first_part in [
        ("topk", "forward_kl", "ghost", 1.0, "float64", None, 40),
        ("topk", "forward_kl", "ghost", 2.0, "float64", 2.0, 40),
        ("topk", "forward_kl", "label", 2.0, "float64", None, 13),
        ("sampled", "forward_kl", "drop", 1.0, "float64", None, 40),
        ("topk", "reverse_kl", "ghost", 2.0, "float64", None, 40),
        ("topk", "jsd", "ghost", 1.0, "float64", None, 77),
        ("topk", "jsd", "renorm", 2.0, "float64", None, 40),
        ("topk", "forward_kl", "ghost", 2.0, "float32", None, 40),
        ("topk", "forward_kl", "ghost", 1.0, "bfloat16", None, 40),
    ]
}
"""The last number is how many rows of the head the first process has; past VOCAB_SIZE the second has padding alone."""


def inputs(recording: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, SparseTargets, Tensor, Tensor]:
    """Hidden, weight, bias, targets, labels and row weights."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH, weight_VH, bias_V = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in [(NUM_ROWS, 6), (PADDED, 6), (PADDED,)]
    )
    teacher_NV = torch.softmax(torch.randn(NUM_ROWS, VOCAB_SIZE, generator=generator, dtype=torch.float64) * 2, -1)
    weights_NK, ids_NK = teacher_NV.topk(8)
    ids_NK[::5, 3] = ids_NK[::5, 0]
    ids_NK[::7, 2] = VOCAB_SIZE + 1
    tail_N = 1 - weights_NK.sum(-1)
    labels_N = torch.randint(0, VOCAB_SIZE, (NUM_ROWS,), generator=generator)
    labels_N[::3] = -100
    targets = SparseTargets(ids_NK, weights_NK, None if recording == "sampled" else tail_N, recording)
    return hidden_NH, weight_VH, bias_V, targets, labels_N, torch.rand(NUM_ROWS, generator=generator)


class Head(nn.Module):
    """A head whose forward returns the loss, as FSDP2 wants it."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight_VH), nn.Parameter(bias_V)

    def forward(self, hidden_NH: Tensor, targets: SparseTargets, labels_N: Tensor) -> Tensor:
        return linear_sparse_kl(
            hidden_NH, self.weight, targets, labels_N, bias_V=self.bias, alpha=0.5, vocab_size=VOCAB_SIZE
        ).loss


def split_by_vocabulary(rank: int, case: tuple) -> dict[str, Tensor]:
    recording, settings, dtype, first_part = case
    hidden_NH, weight_VH, bias_V, targets, labels_N, row_weights_N = inputs(recording, dtype)
    mine = slice(0, first_part) if rank == 0 else slice(first_part, PADDED)
    leaves = [x.clone().requires_grad_() for x in (hidden_NH, weight_VH[mine], bias_V[mine])]
    result = vocab_parallel_sparse_kl(
        *leaves[:2],
        targets,
        labels_N,
        bias_v=leaves[2],
        group=distributed.group.WORLD,
        first_id=mine.start,
        vocab_size=VOCAB_SIZE,
        alpha=0.4,
        row_weights_N=row_weights_N,
        workspace_mb=1,
        **settings,
    )
    result.loss.backward()
    return {
        "loss": result.loss.detach(),
        "kl": result.kl_N,
        "ce": result.ce_N,
        **{name: leaf.grad for name, leaf in zip(["hidden", "weight", "bias"], leaves, strict=True)},
    }


def sharded_parameters(rank: int) -> dict[str, Tensor | str]:
    hidden_NH, weight_VH, bias_V, targets, labels_N, _ = inputs("topk", torch.float32)
    head = Head(weight_VH, bias_V)
    fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
    rows = slice(0, NUM_ROWS // 2) if rank == 0 else slice(NUM_ROWS // 2, NUM_ROWS)
    some = SparseTargets(targets.ids_NK[rows], targets.weights_NK[rows], targets.tail_N[rows])
    loss = head(hidden_NH[rows], some, labels_N[rows])
    loss.backward()
    outside = ""
    head.reshard()
    try:
        linear_sparse_kl(hidden_NH, head.weight, targets, labels_N, alpha=0.5)
    except TypeError as error:
        outside = str(error)
    return {"loss": loss.detach(), "weight": head.weight.grad.full_tensor(), "refusal": outside}


def main(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {name: split_by_vocabulary(rank, case) for name, case in CASES.items()}
    results["sharded"] = sharded_parameters(rank)
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
