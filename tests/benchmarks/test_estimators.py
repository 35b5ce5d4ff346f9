"""What benchmarks/estimators.py and gradient_variance.py try is what they say it is; which one wins is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def estimators(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import estimators

    return estimators


def test_the_tail_aware_divergence_is_the_kl_where_its_factor_is_one(estimators) -> None:
    p_V = torch.tensor([0.43, 0.2, 0.12, 0.1, 0.05, 0.05, 0.03, 0.02])
    logp_NV = p_V.log().expand(4, -1)
    logq_NV = torch.randn((4, len(p_V)), generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    rest = float(p_V.sort(descending=True).values[3:].sum())
    kl_N = (p_V * (logp_NV - logq_NV)).sum(-1)
    # float32 sums of eight terms
    torch.testing.assert_close(estimators.tail_aware(logp_NV, logq_NV, 2, 3, rest), kl_N, rtol=1e-5, atol=1e-6)
    assert (estimators.tail_aware(logp_NV, logq_NV, 2, 3, 2 * rest) > kl_N).all()


def test_a_row_counts_by_its_entropy_and_the_highest_fifth_alone(estimators) -> None:
    logits_NV = torch.eye(10, 64) * torch.arange(10.0)[:, None]
    entropies_N = estimators.StudentEntropy.entropies(logits_NV)
    expected_N = torch.distributions.Categorical(logits=logits_NV).entropy()
    torch.testing.assert_close(entropies_N, expected_N, rtol=1e-5, atol=1e-6)
    # the sharper a row, the later it stands here
    assert estimators.HighestStudentEntropy.weights(entropies_N).tolist() == [1.0, 1.0] + 8 * [0.0]


@pytest.mark.slow
def test_a_loss_is_no_way_from_itself_and_some_way_from_every_other(estimators, tmp_path: Path) -> None:
    import peer_losses
    from quality import begun_bench

    ghost = peer_losses._own("ghost")
    found = peer_losses.measure(begun_bench(tmp_path, "smol", smoke=True), {"again": ghost}, 1)
    (row,) = [row for row in found["losses"] if row["loss"] == "again"]
    # the same program on the same rows
    assert row["gradient_from"].pop("capgap, ghost") == 0
    assert set(row["gradient_from"]) == {f"capgap, {tail}" for tail in ("drop", "renorm", "label")}
    assert min(row["gradient_from"].values()) > 0.05


@pytest.mark.slow
def test_variances_fall_with_samples_and_no_training_is_done_twice(tmp_path: Path) -> None:
    flags = ["--run", "smol", "--smoke", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    of_one_seed = [*flags, "--only-seed", "1"]
    _run("gradient_variance.py", *flags)
    (path,) = tmp_path.glob("gradient-variance-*.json")
    found = {row["recording"]: row for row in json.loads(path.read_text())["figures"]["recordings"]}
    errors = [found[f"sampled, n = {n}, systematic"]["error"] for n in (12, 25, 50)]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0, "more samples add less"

    said = _run("estimators.py", *of_one_seed)
    lines = (tmp_path / "estimators-smol.jsonl").read_text()
    found = {json.loads(line)["arm"]: json.loads(line) for line in lines.splitlines()}
    assert {line["seed"] for line in found.values()} == {1}
    assert len(found) == len(said.splitlines()) == 3
    assert len({line["heldout_loss"] for line in found.values()}) == 3, "each has a loss of its own"
    assert _run("estimators.py", *of_one_seed) == "" and (tmp_path / "estimators-smol.jsonl").read_text() == lines


def _run(script: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, str(BENCHMARKS / script), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
