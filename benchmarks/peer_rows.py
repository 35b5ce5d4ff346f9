"""Other programs' captures and losses beside capgap's, on the same rows of a real teacher over real text.

python benchmarks/peer_rows.py --distillkit ~/DistillKit      a checkout of github.com/arcee-ai/DistillKit

Their own code runs, nothing is read off it: DistillKit's compression and sparse loss, and the sparse loss of TRL's
asynchronous distillation where `trl` is installed. Bytes, what the distributions lose and how fast they are written
and read come from benchmarks/store.py, on these rows. A loss is timed with the student's head, forward and backward,
and its gradient at the student's hidden states is held against that of the whole distributions.

Legend: N rows, L rows of a sequence, K ids kept, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# found beside this file also where Python is told not to look there: -P, PYTHONSAFEPATH
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from distillkit_rows import CONFIGS, DistillKit
from machine import RESULTS, caught, keep
from memory import peak_mb
from store import measure
from teacher_rows import NUM_KEPT, NUM_SAMPLES, record
from torch import Tensor
from transformers import PreTrainedModel

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl
from capgap.pipeline.eval.heldout import first_sequences
from capgap.pipeline.models.load import load_model, model_at
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import keep_freed_memory
from capgap.pipeline.store.ranking import read_counts
from capgap.schemas.manifest import Manifest
from capgap.schemas.records import Sequences

_CHUNK_OF_TRL = 256  # rows, its own constant

Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    work = Path("runs/quality-smol")
    parser.add_argument("--name", default="smol", help="in the results")
    parser.add_argument("--corpus", type=Path, default=work / "shared/corpus", help="a finished stage's folder")
    parser.add_argument("--teacher", default=str(work / "shared/teacher"), help="a finished stage's or model's folder")
    parser.add_argument("--student", default=str(work / "students/student/seed-0"), help="likewise")
    parser.add_argument("--distillkit", type=Path, help="a checkout")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    manifest = read_manifest(flags.corpus)
    assert manifest is not None, f"{flags.corpus} is no finished stage"
    sequences = first_sequences(flags.corpus, manifest.shard_sets["student"], flags.sequences)
    teacher, student = (load_model(model_at(one), "cpu", torch.float32) for one in (flags.teacher, flags.student))
    peer = DistillKit(flags.distillkit) if flags.distillkit else None
    problem = Problem(teacher, student, sequences, _vocab_size(manifest))
    figures = {
        "versions": {"DistillKit": peer and peer.commit, "trl": _version("trl")},
        "about": {"corpus": manifest.content[:12], "sequences": flags.sequences},
        "losses": losses(problem, peer, flags.repeats),
        "captures": captures(problem, peer, flags.repeats),
        "stored": measure(flags.name, _rows(flags.corpus, manifest, problem, sequences), flags.repeats, peer),
    }
    print(keep(f"peer-rows-{flags.name}", "cpu", figures, flags.results))


class Problem:
    """The teacher's logits and the student's hidden states.

    Attributes:
        teacher_NV: the teacher's logprobs.
        student_NV: the student's.
        hidden_NH: the student's hidden states, of the first sequence alone, as is what the losses are given.
        weight_VH: its head.
    """

    @torch.no_grad()
    def __init__(
        self, teacher: PreTrainedModel, student: PreTrainedModel, sequences: Sequences, vocab_size: int
    ) -> None:
        tokens_BL1 = torch.from_numpy(sequences.tokens_BL1).long()
        started = time.process_time()
        logits = [teacher(input_ids=one[None, :-1], use_cache=False).logits[0, :, :vocab_size] for one in tokens_BL1]
        self.forward_s = (time.process_time() - started) / (tokens_BL1.numel() - len(tokens_BL1))
        self.teacher_NV = torch.log_softmax(torch.cat(logits).float(), -1)
        hidden = [student.base_model(input_ids=one[None, :-1]).last_hidden_state[0] for one in tokens_BL1]
        weight_VH = student.get_output_embeddings().weight[:vocab_size]
        self.student_NV = torch.log_softmax(torch.cat(hidden) @ weight_VH.T, -1)
        self.hidden_NH = hidden[0].clone().requires_grad_()
        self.weight_VH = weight_VH.clone().requires_grad_()
        self.labels_N = tokens_BL1[0, 1:]
        self.length = len(self.labels_N)


def losses(problem: Problem, peer: DistillKit | None, repeats: int) -> list[dict[str, Any]]:
    """Value, CPU milliseconds and peak MiB of each loss, and how far its gradient is from the whole vocabulary's."""
    ways = _losses_of(problem, peer)
    whole = _gradient(problem, ways["whole vocabulary, plain torch"])
    rows, failed = [], list[str]()
    for name, loss in ways.items():
        with caught(name, failed):
            value, taken = 0.0, []
            for _ in range(repeats):
                started = time.process_time()
                value, gradient_NH = _gradient(problem, loss)
                taken.append(time.process_time() - started)
            apart = float((gradient_NH - whole[1]).norm() / whole[1].norm())
            peak = peak_mb(lambda loss=loss: _gradient(problem, loss), "cpu")
            row = {"loss": name, "nats": round(value, 5), "gradient_error": round(apart, 4)}
            rows.append(row | {"cpu_ms": round(1000 * statistics.median(taken), 1), "peak_mb": round(peak, 1)})
            print(rows[-1], flush=True)
    return [*rows, *({"failed": one} for one in failed)]


def _losses_of(problem: Problem, peer: DistillKit | None) -> dict[str, Loss]:
    """By name, what gives the mean over rows from hidden states and head."""
    logp_NV = problem.teacher_NV[: problem.length]
    top = record(logp_NV, problem.student_NV[: problem.length], _tokens(problem), slice(0, problem.length), 1.0)
    ids_NK, logprobs_NK, tail_N = (torch.from_numpy(top[key]) for key in ("ids", "logprobs", "tail"))
    ids_NK = ids_NK.long()
    # as a training hands them over: what its reader has looked at is not looked at again
    topk = SparseTargets(ids_NK, logprobs_NK.exp(), tail_N, "topk", checked=True)
    sampled = SparseTargets(*_counted(top["samples"]), None, "sampled", checked=True)

    def ours(targets: SparseTargets) -> Loss:
        return lambda hidden_NH, weight_VH: (
            linear_sparse_kl(hidden_NH, weight_VH, targets, problem.labels_N, alpha=1.0).loss
        )

    def whole(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        logq_NV = torch.log_softmax(hidden_NH @ weight_VH.T, -1)
        return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1).mean()

    found: dict[str, Loss] = {
        "whole vocabulary, plain torch": whole,
        f"capgap, {NUM_SAMPLES} samples": ours(sampled),
        f"capgap, top {NUM_KEPT} and tail": ours(topk),
    }
    if peer is not None:
        of_logits = peer.losses(logp_NV.shape[1])
        for name, loss in of_logits.items():
            found[f"DistillKit, {name}"] = _with_head(loss, logp_NV)
    trl = _trl(ids_NK, logprobs_NK)
    return found | ({f"TRL, top {NUM_KEPT} and tail": trl} if trl else {})


def _counted(samples_Nn: np.ndarray) -> tuple[Tensor, Tensor]:
    """Distinct tokens of each row and their shares of the samples, padded with weight 0."""
    found = [np.unique(samples_n, return_counts=True) for samples_n in samples_Nn]
    shape = len(found), max(len(ids) for ids, _ in found)
    ids_NK, weights_NK = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for row, (ids, counts) in enumerate(found):
        ids_NK[row, : len(ids)], weights_NK[row, : len(ids)] = ids, counts / samples_Nn.shape[1]
    return torch.from_numpy(ids_NK), torch.from_numpy(weights_NK)


def _with_head(loss: Callable[..., Tensor], logp_NV: Tensor) -> Loss:
    return lambda hidden_NH, weight_VH: loss(hidden_NH @ weight_VH.T, logp_NV)


def _trl(ids_NK: Tensor, logprobs_NK: Tensor) -> Loss | None:
    """The forward KL of its asynchronous distillation; None where it is not installed."""
    try:
        from trl.experimental.async_distillation import async_distillation_trainer as trl
    except ImportError as error:
        print(f"TRL cannot be driven here: {error}")
        return None
    every = torch.ones_like(ids_NK, dtype=torch.bool)

    def mean(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        total, *_ = trl._chunked_jsd_loss(
            hidden_NH, weight_VH, None, 1.0, None, ids_NK, logprobs_NK, every, 0.0, 1.0, True, None, 1, _CHUNK_OF_TRL
        )
        return total / len(hidden_NH)

    return mean


def _gradient(problem: Problem, loss: Loss) -> tuple[float, Tensor]:
    problem.hidden_NH.grad = problem.weight_VH.grad = None
    value = loss(problem.hidden_NH, problem.weight_VH)
    value.backward()
    assert problem.hidden_NH.grad is not None
    return float(value.detach()), problem.hidden_NH.grad


def captures(problem: Problem, peer: DistillKit | None, repeats: int) -> dict[str, float]:
    """CPU microseconds a row: the teacher's forward pass, and what turns its logprobs into what is written."""
    logp_NV = problem.teacher_NV[: problem.length]
    rows, tokens = slice(0, problem.length), _tokens(problem)
    ways: dict[str, Callable[[], object]] = {
        f"capgap, {NUM_SAMPLES} samples and top {NUM_KEPT}, before the codec": lambda: record(
            logp_NV, problem.student_NV[rows], tokens, rows, 1.0
        )
    }
    if peer is not None:
        for name in CONFIGS:
            compressor = peer.compressor(name, logp_NV.shape[1])
            ways[f"DistillKit, {name}"] = lambda c=compressor: c.compress(logp_NV[None])
    found = {"the teacher's forward pass": round(1e6 * problem.forward_s, 1)}
    for name, way in ways.items():
        taken = []
        for _ in range(repeats):
            started = time.process_time()
            way()
            taken.append(time.process_time() - started)
        found[name] = round(1e6 * statistics.median(taken) / problem.length, 1)
        print(name, found[name], "us a row", flush=True)
    return found


def _rows(folder: Path, manifest: Manifest, problem: Problem, sequences: Sequences) -> dict[str, Any]:
    """As those of teacher_rows.py."""
    parts = []
    for number, tokens_L1 in enumerate(sequences.tokens_BL1):
        own = slice(number * problem.length, (number + 1) * problem.length)
        whole = slice(0, problem.length)
        parts.append(record(problem.teacher_NV[own], problem.student_NV[own], tokens_L1, whole, 1.0))
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return joined | {
        "tokens": sequences.tokens_BL1,
        "starts": sequences.starts_BL1,
        "train_counts": read_counts(folder, manifest.files, "student", _vocab_size(manifest)),
        "temperature": np.float64(1),
    }


def _tokens(problem: Problem) -> Any:
    """Of the first sequence; its first token is no label, and counts for nothing here."""
    return np.concatenate([[0], problem.labels_N.numpy()])


def _vocab_size(manifest: Manifest) -> int:
    return int(manifest.facts["tokenizer"]["vocab_size"])  # type: ignore[index,call-overload,arg-type]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
