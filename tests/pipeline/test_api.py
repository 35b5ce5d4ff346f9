from __future__ import annotations

import pydoc
import re
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import run
from threading import Thread
from typing import Any

import pytest
import torch
import webdataset as wds
from tiny_models import tiny_llama
from tiny_runs import NEEDED, settings_of
from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM, LlamaForCausalLM

import capgap
from capgap import Cache, DistillationLoss, open_cache
from capgap.kernels.sparse_kl import SparseTargets
from capgap.kernels.sparse_kl.reference import linear_sparse_kl
from capgap.pipeline.store.samples import collate_samples
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import CorruptError, InputError, MismatchError, SettingError
from capgap.schemas.run_file import RunFile


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    settings: dict[str, Any] = settings_of(tmp_path_factory.mktemp("run") / "tiny", "number")
    settings["cache"] |= {"recording": "both", "top_k": 9, "extra_temperatures": [2.0]}
    settings["train"] |= {"recording": "sampled"}
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


def test_a_loss_that_begins_at_alpha_0_has_its_temperature_where_a_batch_brings_another_alpha(
    cache: Cache, student: LlamaForCausalLM
) -> None:
    batch = next(iter(cache.batches(2, recording="topk", temperature=2.0)))
    at = {"recording": "topk", "temperature": 2.0}
    warming, whole = (DistillationLoss(student, cache, alpha=first, **at) for first in (0.0, 0.5))
    assert warming(batch, alpha=0.5).loss.item() == whole(batch).loss.item()
    assert warming(batch).loss.item() == whole(batch, alpha=0.0).loss.item()
    with pytest.raises(SettingError, match="no targets at this temperature"):
        DistillationLoss(student, cache, alpha=0.0, recording="topk", temperature=3.0)
    with pytest.raises(MismatchError, match="does not support this divergence"):
        DistillationLoss(student, cache, alpha=0.0, recording="sampled", divergence="reverse_kl")


def test_a_model_with_a_state_that_runs_on_is_not_trained_across_sequences(cache: Cache) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Lfm2Config(**shape, vocab_size=320, intermediate_size=32, layer_types=["conv", "full_attention"])
    loss = DistillationLoss(Lfm2ForCausalLM(config), cache, recording="topk")
    batch = next(iter(cache.batches(4, recording="topk", row_len=2 * 32)))
    # the second time as well as the first
    for _ in range(2):
        with pytest.raises(InputError, match="would look across the sequences or documents of a row; found hidden st"):
            loss(batch)
    assert loss(next(iter(cache.batches(4, recording="topk")))).loss.isfinite()


def test_the_proof_before_the_first_row_of_sequences_leaves_all_as_it_was(
    cache: Cache, student: LlamaForCausalLM
) -> None:
    student.train()
    student.model.layers[0].eval()
    modes = [part.training for part in student.modules()]
    batch = next(iter(cache.batches(4, recording="topk", row_len=2 * 32)))
    loss, state = DistillationLoss(student, cache, recording="topk"), torch.get_rng_state()
    # autocast rounds by more than the proof lets two float32 passes differ
    with torch.autocast("cpu", torch.bfloat16):
        loss(batch).loss.backward()
    assert [part.training for part in student.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


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
    with pytest.raises(SettingError, match=r"alpha: cannot be used; found 2\.0, expected a number from 0 to 1"):
        DistillationLoss(student, cache, recording="topk")(next(iter(cache.batches(2, recording="topk"))), alpha=2.0)
    with pytest.raises(SettingError, match="rank: there is no such rank; found 4 of world_size 4"):
        cache.batches(8, recording="topk", rank=4, world_size=4)
    with pytest.raises(MismatchError, match="does not support this divergence"):
        DistillationLoss(student, cache, recording="sampled", divergence="reverse_kl")
    with pytest.raises(InputError, match="found a finished corpus stage, expected the folder of a finished cache"):
        open_cache(out / "corpus")
    with pytest.raises(InputError, match=r"found no manifest\.json"):
        open_cache(out / "nowhere")


def test_a_model_with_fewer_ids_is_refused(cache: Cache) -> None:
    with pytest.raises(MismatchError, match="fewer ids than the cache; found 16, expected at least"):
        DistillationLoss(tiny_llama(vocab_size=16), cache, recording="topk")


def test_a_manifest_that_was_changed_is_damage(out: Path, tmp_path: Path) -> None:
    text = (out / "cache" / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"temperature": 1.0', '"temperature": 1.5', 1))
    assert (tmp_path / "manifest.json").read_text() != text
    with pytest.raises(CorruptError, match="not what was written"):
        open_cache(tmp_path)


def test_a_cache_shows_itself_in_a_few_lines(cache: Cache, out: Path) -> None:
    lines = repr(cache).splitlines()
    topk, sampled = (cache.manifest.shard_sets[name] for name in ("topk", "sampled"))
    assert lines[0] == f"Cache at {out / 'cache'}"
    assert "  sampled: 20 samples a token, at temperature 1" in lines
    assert "  topk: top 9, near-lossless a token, at temperature 1 or 2" in lines
    for shards in (topk, sampled):
        size = f"{shards.num_sequences} sequences of 32 tokens, {shards.num_tokens:,} in all"
        files = f"{len(shards.shards)} shards, {shards.num_bytes / shards.num_tokens:.1f} bytes a token"
        assert f"    to train on: {size}; {files}" in lines
    text = "\n".join(lines)
    assert f"vocabulary: {cache.vocab_size} ids, 320 with" in text and "held out: " in text
    assert f"teacher: {out.parent / 'given'}, by transformers" in text and "context: packed" in text
    assert f"fingerprint {cache.facts.tokenizer.fingerprint[:12]}" in text
    assert len(lines) < 14 and max(len(line) for line in lines[1:] if "teacher" not in line) < 100


def test_a_batch_shows_its_shapes(cache: Cache) -> None:
    batch = next(iter(cache.batches(2, recording="topk")))
    assert repr(batch).splitlines() == [
        "Batch on cpu: 64 targets",
        "  input_ids_BL  [2, 32] int64",
        "  labels_BL     [2, 32] int64",
        "  ids_NK        [64, 9] int64",
        "  weights_NK    [64, 9] float32",
        "  tail_N        [64] float32",
        "  positions_BL  none",
    ]


@pytest.mark.parametrize("recording, temperature", [("sampled", None), ("topk", None), ("topk", 2.0)])
def test_a_webdataset_gives_every_sequence_of_the_loader_with_its_bits(cache: Cache, recording, temperature) -> None:
    chosen = {"recording": recording, "temperature": temperature, "heldout": True}
    samples = {sample["tokens"][:-1].tobytes(): sample for sample in cache.webdataset(**chosen)}
    num_sequences = cache.manifest.shard_sets[f"heldout-{recording}"].num_sequences
    assert len(samples) == num_sequences
    num_seen = 0
    for batch in cache.batches(1, **chosen):
        found = collate_samples([samples[batch.input_ids_BL[0].numpy().tobytes()]])
        num_seen += 1
        for here, there in zip(found.tensors().values(), batch.tensors().values(), strict=True):
            assert (here is None) == (there is None)
            assert here is None or torch.equal(here, there)
    assert num_seen == num_sequences


def test_a_cache_behind_a_url_is_a_webdataset_for_the_workers_of_a_loader(
    cache: Cache, out: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("CAPGAP_DOWNLOADS", str(tmp_path / "copies"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(out)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        there = open_cache(f"http://127.0.0.1:{server.server_port}/cache/")
        assert repr(there).startswith("Cache at http://127.0.0.1:")
        loader = wds.WebLoader(there.webdataset(recording="sampled"), batch_size=None, num_workers=2)
        found = {sample["__key__"]: sample for sample in loader}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    alone = list(cache.webdataset(recording="sampled"))
    assert sorted(found) == sorted(sample["__key__"] for sample in alone)
    for sample in alone:
        for name in ("tokens", "ids", "weights", "label_logprobs"):
            assert found[sample["__key__"]][name].numpy().tobytes() == sample[name].tobytes()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize("module", ["capgap", "capgap.pipeline"])
def test_a_package_does_not_wait_for_torch(module: str) -> None:
    code = f"import sys, {module}; dir({module}); print({{'torch', 'transformers', 'pydantic'}} & {{*sys.modules}})"
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_package_names_and_explains_what_it_gives() -> None:
    assert dir(capgap) == sorted(capgap.__all__)
    assert {"__version__", "open_cache", "Cache", "DistillationLoss", "run", "collate_samples"} <= {*dir(capgap)}
    assert re.fullmatch(r"\d+\.\d+.*", capgap.__version__)
    for name in set(dir(capgap)) - {"__version__"}:
        assert getattr(capgap, name).__doc__, name
    text = pydoc.render_doc(capgap, renderer=pydoc.plaintext)
    for name in (*dir(capgap), f"VERSION\n    {capgap.__version__}"):
        assert name in text or name == "__version__"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        capgap.nothing  # noqa: B018
