"""Two processes, each with a part of the head, against one that has all of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl

_PROGRAM = Path(__file__).with_name("two_processes.py")
_spec = importlib.util.spec_from_file_location("two_processes", _PROGRAM)
program = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(program)

# The dense loss in the same dtype sums in another order: rounding of each, times sums of 6 and 6000 terms.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.02}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    processes = [subprocess.Popen([sys.executable, str(_PROGRAM), str(rank), str(folder)]) for rank in range(2)]
    assert [process.wait(timeout=1800) for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", program.CASES)
def test_a_head_split_by_vocabulary_gives_the_loss_and_gradients_of_the_whole(results, name: str) -> None:
    recording, settings, dtype, _ = program.CASES[name]
    hidden_NH, weight_VH, bias_V, targets, labels_N, row_weights_N = program.inputs(recording, dtype)
    leaves = [x.requires_grad_() for x in (hidden_NH, weight_VH, bias_V)]
    dense = linear_sparse_kl(
        *leaves[:2],
        targets,
        labels_N,
        bias_V=bias_V,
        alpha=0.4,
        vocab_size=program.VOCAB_SIZE,
        row_weights_N=row_weights_N,
        **settings,
    )
    dense.loss.backward()
    first, second = (result[name] for result in results)
    for key in ("loss", "kl", "ce", "hidden"):
        assert torch.equal(first[key], second[key]), key
    whole = {key: torch.cat([first[key], second[key]]) for key in ("weight", "bias")}
    found = [first["loss"], first["kl"], first["ce"], first["hidden"], whole["weight"], whole["bias"]]
    expected = [dense.loss.detach(), dense.kl_N, dense.ce_N, *(leaf.grad for leaf in leaves)]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= TOLERANCE[dtype] * b.norm()
        assert b.norm() > 0
    assert (whole["weight"][program.VOCAB_SIZE :] == 0).all()


def test_under_fsdp2_the_loss_sees_the_whole_head(results) -> None:
    hidden_NH, weight_VH, bias_V, targets, labels_N, _ = program.inputs("topk", torch.float32)
    head = program.Head(weight_VH, bias_V)
    losses = []
    for rows in (slice(0, 3000), slice(3000, 6000)):
        some = SparseTargets(targets.ids_NK[rows], targets.weights_NK[rows], targets.tail_N[rows])
        losses.append(head(hidden_NH[rows], some, labels_N[rows]))
        (losses[-1] / 2).backward()  # FSDP2 takes the mean over processes
    for result, loss in zip(results, losses, strict=True):
        assert torch.equal(result["sharded"]["loss"], loss.detach())
        # one float32 addition, and halves taken after it instead of before
        torch.testing.assert_close(result["sharded"]["weight"], head.weight.grad, rtol=1e-6, atol=1e-9)


def test_a_sharded_head_is_refused_with_what_to_do(results) -> None:
    for result in results:
        assert (
            "weight_VH: got a DTensor [80, 6], expected a plain tensor; call the loss inside the forward of the "
            in (result["sharded"]["refusal"])
        )
