from __future__ import annotations

import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
from tiny_runs import NEEDED, settings_of
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from capgap.kernels.sparse_kl import SparseTargets
from capgap.kernels.sparse_kl.reference import linear_sparse_kl
from capgap.pipeline import Cache, DistillationLoss, open_cache
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import CorruptError, InputError, MismatchError, SettingError
from capgap.schemas.run_file import RunFile


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    settings: dict[str, Any] = settings_of(tmp_path_factory.mktemp("run") / "tiny", "number")
    settings["cache"] |= {"recording": "both", "top_k": 9, "extra_temperatures": [2.0]}
    for instance in NEEDED:
        carry_out(RunFile.model_validate(settings), instance)
    return Path(settings["out"])


@pytest.fixture(scope="module")
def cache(out: Path) -> Cache:
    return open_cache(out / "cache")


@pytest.fixture
def student(out: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(out / "student" / "seed-1" / "model")


@pytest.mark.parametrize(
    "recording, divergence, temperature",
    [("sampled", "forward_kl", 1.0), ("topk", "reverse_kl", 1.0), ("topk", "forward_kl", 2.0)],
)
def test_the_loss_of_a_batch_is_that_of_the_model_s_own_logits(
    cache: Cache, student: LlamaForCausalLM, recording, divergence, temperature
) -> None:
    batch = next(iter(cache.batches(2, recording=recording, temperature=temperature)))
    loss = DistillationLoss(
        student, cache, alpha=0.3, recording=recording, temperature=temperature, divergence=divergence
    )
    found = loss(batch)
    logits_NV = student(batch.input_ids_BL).logits.flatten(0, 1)[:, : cache.vocab_size]
    expected = linear_sparse_kl(
        logits_NV,
        torch.eye(cache.vocab_size),
        SparseTargets(batch.ids_NK, batch.weights_NK, batch.tail_N, recording),
        batch.labels_BL.flatten(),
        alpha=0.3,
        temperature=temperature,
        divergence=divergence,
    )
    # sums of a few hundred float32 terms in another order
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_alpha_may_move_from_batch_to_batch(cache: Cache, student: LlamaForCausalLM) -> None:
    batch = next(iter(cache.batches(2, recording="sampled")))
    loss = DistillationLoss(student, cache, recording="sampled")
    kl, ce = loss(batch, alpha=1.0).loss, loss(batch, alpha=0.0).loss
    assert loss(batch, alpha=0.25).loss.item() == pytest.approx(0.25 * kl.item() + 0.75 * ce.item(), rel=1e-5)


def test_held_out_sequences_are_others_than_those_to_train_on(cache: Cache) -> None:
    def rows(heldout: bool) -> set[tuple[int, ...]]:
        batches = cache.batches(1, recording="topk", heldout=heldout)
        return {tuple(batch.input_ids_BL.flatten().tolist()) for batch in batches}

    assert rows(True) and rows(False) and not rows(True) & rows(False)


def test_a_loader_goes_on_where_its_state_says(cache: Cache) -> None:
    whole = [batch.input_ids_BL for batch in cache.batches(2, recording="sampled", seed=3)]
    loader = cache.batches(2, recording="sampled", seed=3)
    stream = iter(loader)
    seen = [next(stream).input_ids_BL for _ in range(3)]
    resumed = cache.batches(2, recording="sampled", seed=3)
    resumed.load_state_dict(loader.state_dict())
    seen += [batch.input_ids_BL for batch in resumed]
    assert len(seen) == len(whole) and all(torch.equal(*pair) for pair in zip(seen, whole, strict=True))


def test_what_a_run_file_would_refuse_is_refused(cache: Cache, student: LlamaForCausalLM, out: Path) -> None:
    with pytest.raises(SettingError, match="several recordings"):
        cache.batches(2)
    with pytest.raises(SettingError, match="no targets at this temperature"):
        cache.batches(2, recording="topk", temperature=3.0)
    with pytest.raises(SettingError, match="alpha"):
        DistillationLoss(student, cache, alpha=2.0, recording="topk")
    with pytest.raises(MismatchError, match="does not support this divergence"):
        DistillationLoss(student, cache, recording="sampled", divergence="reverse_kl")
    with pytest.raises(InputError, match="found a finished corpus, expected the folder of a cache"):
        open_cache(out / "corpus")
    with pytest.raises(InputError, match="found no manifest"):
        open_cache(out / "nowhere")


def test_a_model_with_fewer_ids_is_refused(cache: Cache) -> None:
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(MismatchError, match="fewer ids than the cache; found 16, expected at least"):
        DistillationLoss(LlamaForCausalLM(config), cache, recording="topk")


def test_a_manifest_that_was_changed_is_damage(out: Path, tmp_path: Path) -> None:
    text = (out / "cache" / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"temperature": 1.0', '"temperature": 1.5', 1))
    assert (tmp_path / "manifest.json").read_text() != text
    with pytest.raises(CorruptError, match="not what was written"):
        open_cache(tmp_path)


def test_the_package_itself_does_not_wait_for_torch() -> None:
    code = "import sys, capgap.pipeline; print('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
