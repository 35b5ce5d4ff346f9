"""Compare the losses of axolotl and TRL, run from their own packages, with capgap's: gradients and time.

pip install --no-deps --target peers axolotl==0.19.0 trl==1.16.0 liger-kernel==0.8.5
python benchmarks/peer_losses.py --packages peers --run smol-adapted

Both train on a teacher's top-k tokens: axolotl on the user's own or on a server's, TRL on a server's. Neither makes a
cache, so their losses are given the targets of a capgap cache. Where a gradient equals one of capgap's, a row of
benchmarks/quality.py says what a student gains from it; otherwise the figures say how much it differs.

Legend: B sequences, L tokens of each, N rows, K top-k tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import torch
from machine import RESULTS, keep
from quality import Bench, begun_bench
from quality_arms import RUNS, arms
from torch import Tensor

from capgap.kernels.sparse_kl import SparseTargets, Tail, linear_sparse_kl
from capgap.pipeline.store import Batch, LoaderSettings, SequenceLoader

TOP_K = 50


def main() -> None:
    """Measure, print the figures, and write them to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder into which pip installed them")
    parser.add_argument("--run", choices=list(RUNS), default="smol", help="the run whose models and text are used")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--work", type=Path, help="work folder of benchmarks/quality.py, whose caches are used")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--smoke", action="store_true", help="run at the smallest size, to check that everything works")
    flags = parser.parse_args()
    peers = peer_losses(flags.packages)
    figures = measure(begun_bench(flags.work, flags.run, flags.smoke), peers, 2 if flags.smoke else flags.batches)
    figures["packages"] = {name: version(name) for name in ("axolotl", "trl", "liger-kernel")}
    for row in figures["losses"]:
        print(row)
    print(keep(f"peer-losses-{flags.run}", "cpu", figures, flags.results))


@dataclass(frozen=True)
class Rows:
    """A batch as the student's head sees it, with its targets.

    Attributes:
        hidden_BLH: Last hidden states, a leaf of the autograd graph.
        weight_VH: Weight of the head, a leaf of the autograd graph.
        targets: The teacher's top-k tokens in the form that capgap's loss takes.
        labels_BL: The real next tokens.
        ids_BLK: Ids of the top-k tokens.
        logprobs_BLK: The teacher's logprobs of the top-k tokens.
    """

    hidden_BLH: Tensor
    weight_VH: Tensor
    targets: SparseTargets
    labels_BL: Tensor
    ids_BLK: Tensor
    logprobs_BLK: Tensor


Loss = Callable[[Rows], Tensor]
Gradients = tuple[Tensor, Tensor]


def peer_losses(packages: Path) -> dict[str, Loss]:
    """Return the other programs' losses by name; each is a mean over the rows, in nats."""
    sys.path.append(str(packages.resolve()))
    _without_start("axolotl", packages)
    axolotl = import_module("axolotl.integrations.kd.kernels.liger").LigerFusedLinearKLTopKLogprobLoss
    normalize = import_module("axolotl.integrations.kd.utils").normalize_logprobs
    trl = import_module("trl.experimental.server_distillation.server_distillation_trainer").ServerDistillationTrainer

    def of_axolotl(normalize_topk: bool) -> Loss:
        # cross-entropy's weight, KL's weight, temperature and the beta of forward KL, in the order of axolotl's trainer
        loss = axolotl(0.0, 1.0, 1.0, 0.0, compute_ce_loss=False, normalize_topk=normalize_topk, compiled=False)

        def run(rows: Rows) -> Tensor:
            # axolotl's data loading scales a teacher's logprobs in this way
            logprobs_BLK = normalize(rows.logprobs_BLK, rows.ids_BLK.shape[-1])
            mask_BLK = torch.ones_like(rows.ids_BLK)
            # axolotl's trainer divides the sum by the number of labels
            found: Tensor = loss(
                rows.weight_VH, rows.hidden_BLH, rows.ids_BLK, logprobs_BLK, mask_BLK, true_labels=rows.labels_BL
            )
            return found / rows.labels_BL.numel()

        return run

    def of_trl(add_tail: bool) -> Loss:
        trainer = SimpleNamespace(loss_add_tail=add_tail, _reduce_divergence_loss=trl._reduce_divergence_loss)

        def run(rows: Rows) -> Tensor:
            answer = {"topk_logprobs": rows.logprobs_BLK, "topk_token_ids": rows.ids_BLK}
            logq_BLV = (rows.hidden_BLH @ rows.weight_VH.T).log_softmax(-1)
            found: Tensor = trl._compute_server_forward_kl_loss(trainer, answer, logq_BLV, rows.labels_BL)
            return found

        return run

    return {
        "axolotl, as it is": of_axolotl(False),
        "axolotl, kd_normalize_topk": of_axolotl(True),
        "TRL, loss_add_tail": of_trl(True),
        "TRL, no tail": of_trl(False),
    }


def measure(bench: Bench, peers: dict[str, Loss], num_batches: int) -> dict[str, Any]:
    """Measure how much each loss's gradient differs from capgap's for every `tail`, and its CPU time."""
    own: dict[str, Loss] = {f"capgap, {tail}": _own(tail) for tail in ("drop", "renorm", "ghost", "label")}
    times_s: dict[str, list[float]] = {name: [] for name in own | peers}
    # squared norms of capgap's gradients, and of the other losses' differences from them, summed over batches
    whole = dict.fromkeys(own, 0.0)
    apart = {name: dict.fromkeys(own, 0.0) for name in peers}
    for rows in _batches(bench, num_batches):
        ours: dict[str, Gradients] = {}
        for name, loss in (own | peers).items():
            started = time.process_time()
            found = _gradients(loss, rows)
            times_s[name].append(time.process_time() - started)
            if name in own:
                ours[name] = found
                whole[name] += _squares(*found)
                continue
            for one, (hidden_BLH, weight_VH) in ours.items():
                apart[name][one] += _squares(found[0] - hidden_BLH, found[1] - weight_VH)
    return {
        "about": bench.about,
        "num_batches": num_batches,
        "num_rows": rows.labels_BL.numel(),
        "top_k": rows.ids_BLK.shape[-1],
        "losses": [
            {
                "loss": name,
                "cpu_s": round(statistics.median(taken), 4),
                "gradient_from": {
                    one: float(f"{(value / whole[one]) ** 0.5:.2g}") for one, value in apart.get(name, {}).items()
                },
            }
            for name, taken in times_s.items()
        ],
    }


def _own(tail: Tail) -> Loss:
    def run(rows: Rows) -> Tensor:
        hidden_NH = rows.hidden_BLH.flatten(0, 1)
        labels_N = rows.labels_BL.flatten()
        return linear_sparse_kl(hidden_NH, rows.weight_VH, rows.targets, labels_N, alpha=1.0, tail=tail).loss

    return run


def _batches(bench: Bench, number: int) -> Iterator[Rows]:
    """Yield the first batches of the trainings, with the hidden states of the untrained student."""
    reader = bench.reader(next(arm for arm in arms() if arm.name == f"top-{TOP_K}, ghost"))
    student = bench.student(0)
    weight_VH = student.get_output_embeddings().weight.detach().requires_grad_()
    batches = iter(SequenceLoader(reader, LoaderSettings(bench.settings.batch_sequences, 0)))
    for _ in range(number):
        yield _rows(student, weight_VH, next(batches))


def _rows(student: Any, weight_VH: Tensor, batch: Batch) -> Rows:
    assert batch.ids_NK is not None and batch.weights_NK is not None
    with torch.no_grad():
        hidden_BLH = student.base_model(batch.input_ids_BL).last_hidden_state
    targets = SparseTargets(batch.ids_NK, batch.weights_NK, batch.tail_N)
    kept_BLK = (*batch.labels_BL.shape, -1)
    ids_BLK, logprobs_BLK = batch.ids_NK.view(kept_BLK), batch.weights_NK.log().view(kept_BLK)
    return Rows(hidden_BLH.requires_grad_(), weight_VH, targets, batch.labels_BL, ids_BLK, logprobs_BLK)


def _gradients(loss: Loss, rows: Rows) -> Gradients:
    """Return the loss's gradients of the hidden states and of the head."""
    return torch.autograd.grad(loss(rows), (rows.hidden_BLH, rows.weight_VH))  # type: ignore[return-value]


def _squares(*tensors: Tensor) -> float:
    """Return the sum of the squares of all elements."""
    return sum(float(one.double().square().sum()) for one in tensors)


def _without_start(name: str, packages: Path) -> None:
    """Let a package's modules be imported without its `__init__`, which imports all of its dependencies."""
    for path in (name, f"{name}/integrations", f"{name}/integrations/kd", f"{name}/integrations/kd/kernels"):
        module = ModuleType(path.replace("/", "."))
        module.__path__ = [str(packages.resolve() / path)]
        sys.modules[module.__name__] = module


if __name__ == "__main__":
    main()
