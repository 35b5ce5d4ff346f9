"""What benchmarks/estimators.py and its neighbours try is what they say it is; which one wins is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NUM_ROWS, SAMPLES = 20_000, 8
# of systematic samples of 8: two tokens are surely kept, and one is more often than once
P_V = torch.tensor([0.43, 0.2, 0.12, 0.1, 0.05, 0.05, 0.03, 0.02])


@pytest.fixture
def losses(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import estimator_losses

    return estimator_losses


@pytest.mark.parametrize("name", ["systematic", "threshold", "threshold, tail's mass exact"])
def test_an_estimator_is_unbiased_and_keeps_as_many_tokens_as_it_says(losses, name) -> None:
    p_NV = P_V.expand(NUM_ROWS, -1)
    weights_NV = losses.TARGETS[name](p_NV, torch.Generator().manual_seed(0), SAMPLES)
    # a weight lies within 1 / n of its mean, so 5 standard errors of 20,000 rows are at most 5 / (8 * 141)
    assert (weights_NV.mean(0) - P_V).abs().max() < 5 / (SAMPLES * NUM_ROWS**0.5)
    kept = float((weights_NV > 0).sum(-1).float().mean())
    assert kept == pytest.approx(float((SAMPLES * P_V).clamp(max=1).sum()), abs=0.1)
    is_head_V = P_V >= 1 / SAMPLES
    is_exact = bool((weights_NV[:, is_head_V] == P_V[is_head_V]).all())
    assert is_exact == (name != "systematic")
    sums_N = weights_NV.sum(-1)
    assert (sums_N - 1).abs().max() < (1 / SAMPLES if name == "threshold" else 1e-6)


def test_the_tail_aware_divergence_is_the_kl_where_its_factor_is_one(losses) -> None:
    logp_NV = P_V.log().expand(4, -1)
    logq_NV = torch.randn((4, len(P_V)), generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    rest = float(P_V.sort(descending=True).values[3:].sum())
    arguments = logq_NV, logp_NV, 2, torch.Generator()
    kl = float(losses.whole_kl(*arguments))
    assert float(losses.tail_aware(*arguments, top_k=3, beta=rest)) == pytest.approx(kl, rel=1e-5)
    assert float(losses.tail_aware(*arguments, top_k=3, beta=2 * rest)) > kl


def test_every_rank_lies_in_the_span_of_its_kind_and_kinds_rise_with_ranks(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import entropy_coder

    ranks = np.arange(100_000)
    kinds = entropy_coder._kind_of(ranks)
    assert (np.diff(kinds) >= 0).all() and kinds[-1] < entropy_coder._NUM_KINDS
    for kind in np.unique(kinds)[:-1]:
        low, width = entropy_coder._span(kind)
        assert np.array_equal(ranks[kinds == kind], np.arange(low, low + width))


@pytest.mark.slow
def test_variances_and_trainings_are_kept_and_no_training_is_done_twice(tmp_path) -> None:
    work = tmp_path / "work"
    _run("gradient_variance.py", "--smoke", "--work", str(work), "--results", str(tmp_path))
    (path,) = tmp_path.glob("gradient-variance-*.json")
    found = {row["recording"]: row for row in json.loads(path.read_text())["figures"]["recordings"]}
    systematic = [found[f"sampled, n = {n}, systematic"]["error"] for n in (6, 25, 100)]
    assert systematic == sorted(systematic, reverse=True), "more samples add less"
    assert found["sampled, n = 12, independent"]["error"] > found["sampled, n = 12, systematic"]["error"]

    folders = {"corpus": "shared/corpus", "teacher": "shared/teacher", "student": "students/student/seed-0"}
    flags = [text for name, folder in folders.items() for text in (f"--{name}", str(work / folder))]
    flags += ["--results", str(tmp_path), "--tokens", "1024", "--seeds", "2", "--batches", "2"]
    _run("estimators.py", "train", *flags)
    lines = (tmp_path / "estimators-demo.jsonl").read_text()
    names = {json.loads(line)["arm"] for line in lines.splitlines()}
    assert len(lines.splitlines()) == 2 * len(names) and "sampled, student entropy" in names
    assert "against `sampled`, 2 seeds" in _run("estimators.py", "train", *flags)
    assert (tmp_path / "estimators-demo.jsonl").read_text() == lines
    for what in ("variance", "rows"):
        _run("estimators.py", what, *flags)
        (path,) = tmp_path.glob(f"estimators-{what}-demo-*.json")
        assert len(json.loads(path.read_text())["figures"]["estimators"]) == 12


def _run(script: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, str(BENCHMARKS / script), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
