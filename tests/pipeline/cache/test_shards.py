"""A shard as a unit of work; the stage around it is that of test_stage.py."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from capgap.pipeline.cache import stage
from capgap.pipeline.cache.shards import ShardScorer
from capgap.pipeline.stage.context import Instance, StageContext, StageInput
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import ShardReader, target_temperature_of
from capgap.pipeline.store.batch import collate
from capgap.pipeline.store.codec import TOPK_CODECS
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import CorruptError, InputError, MachineError, SettingError
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

SEQ_LEN = 32
CORPUS, TEACHER, CACHE = Instance("corpus"), Instance("teacher"), Instance("cache")
TOPK = {"recording": "topk", "num_samples": None, "top_k": 12}
BOTH = {"recording": "both", "top_k": 12, "extra_temperatures": [2.0, 0.5]}
BOTH_NAMES = ("sampled", "topk")


def _reader(run: RunFile, manifest: Manifest, recording: str = "sampled") -> ShardReader:
    return ShardReader(Path(run.out) / "cache", manifest.shard_sets[recording])


def _digests(manifest: Manifest, recording: str = "sampled") -> list[str]:
    return [shard.file.sha256 for shard in manifest.shard_sets[recording].shards]


def _context(tiny: RunFile) -> StageContext:
    folder = Path(tiny.out) / "cache"
    (folder / "work").mkdir(parents=True, exist_ok=True)
    inputs = {}
    for name in ("corpus", "teacher"):
        manifest = read_manifest(Path(tiny.out) / name)
        assert manifest is not None
        inputs[name] = StageInput(Path(tiny.out) / name, manifest)
    return StageContext(tiny, CACHE, folder, inputs, "cpu")


def test_the_loss_of_a_shard_is_of_the_labels_that_count(run) -> None:
    scorer = ShardScorer(stage.prepare(_context(run())))
    scored = scorer.score(0)
    mask_BL1 = np.arange(SEQ_LEN + 1) % 3 == np.arange(len(scored.sequences))[:, None] % 3
    few = dataclasses.replace(scored, sequences=dataclasses.replace(scored.sequences, mask_BL1=mask_BL1))
    facts = scorer.write(few).facts
    scorer.close()
    labels_BL = np.stack([one.label_logprobs_L for one in scored.scored])
    assert (facts.num_targets, facts.num_labels) == (labels_BL.size, mask_BL1[:, 1:].sum())
    assert facts.label_loss == pytest.approx(-labels_BL[mask_BL1[:, 1:]].sum(dtype=np.float64), rel=1e-9)


def test_a_shard_of_the_corpus_that_is_gone_is_named(run) -> None:
    tiny = run()
    corpus = carry_out(tiny, CORPUS)
    gone = Path(tiny.out) / "corpus" / corpus.shard_sets["student"].shards[2].file.path
    other = gone.rename(gone.with_suffix(".away"))
    with pytest.raises((InputError, CorruptError), match="student-000002"):
        stage.run(_context(tiny))
    other.rename(gone)


@pytest.mark.parametrize("profile", TOPK_CODECS)
def test_targets_at_a_further_temperature_are_the_teachers_there(run, inputs, profile: str) -> None:
    tiny = run(**TOPK | {"temperature": 1.5, "extra_temperatures": [3.0, 0.75], "profile": profile}, max_tokens=1)
    reader = _reader(tiny, carry_out(tiny, CACHE), "topk")
    sequences, targets = reader.read(0)
    samples = [(sequences, targets, row) for row in range(len(sequences))]
    tokens = torch.from_numpy(sequences.tokens_BL1).long()
    with torch.inference_mode():
        logits_NV = LlamaForCausalLM.from_pretrained(inputs["teacher"]["path"])(tokens[:, :-1]).logits[..., :300]
    for temperature in (0.75, 1.5, 3.0):
        batch = collate(samples, 12, target_temperature_of(reader.codec, 1.5, temperature))
        true_NV = (logits_NV.double().flatten(0, 1) / temperature).softmax(-1)
        true_NK = true_NV.gather(1, batch.ids_NK)
        true_tail_N = 1 - true_NK.where(batch.weights_NK > 0, 0.0).sum(1)
        kept_nats = max(1.5 / temperature * reader.codec.error.kept_nats, reader.codec.error.label_nats)
        # of a difference of logs twice the error, and 1e-4 for float32 logits in other batches
        ratio_NK = (batch.weights_NK / true_NK)[batch.weights_NK > 0]
        assert ratio_NK.log().abs().max() < 2 * kept_nats + 2e-4
        big_N = true_tail_N > 1e-3
        assert big_N.any() and (batch.tail_N / true_tail_N)[big_N].log().abs().max() < 2 * kept_nats + 2e-3
        assert (batch.weights_NK.sum(1) + batch.tail_N - 1).abs().max() < 1e-5
    with pytest.raises(InputError, match=r"no targets at this temperature; found 2, expected one of 0.75, 1.5, 3"):
        target_temperature_of(reader.codec, 1.5, 2.0)


def test_a_disk_that_takes_no_more_stops_the_stage_and_leaves_no_half_shard(run) -> None:
    tiny = run()
    whole = carry_out(tiny, CACHE)
    sizes = [shard.file.num_bytes for shard in whole.shard_sets["sampled"].shards]
    context = _context(tiny)
    shutil.rmtree(context.folder)
    (context.folder / "work").mkdir(parents=True)
    # the limit of the process on a file's size: the system refuses the bytes, as a full disk does
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(sizes) - 1024, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            stage.run(context)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG, "which the command line tells as one line"
    assert list(context.folder.glob("*.tar*")) == list(context.folder.glob("work/s*/*")) == []
    assert _digests(carry_out(tiny, CACHE)) == _digests(whole)


def test_a_shard_can_be_made_by_any_process_that_has_the_job(run) -> None:
    tiny = run(**BOTH)
    first = carry_out(tiny, CACHE)
    context = _context(tiny)
    shutil.rmtree(context.folder)
    (context.folder / "work").mkdir(parents=True)
    job = pickle.loads(pickle.dumps(stage.prepare(context)))
    assert job == stage.prepare(context)
    elsewhere = subprocess.run(
        [sys.executable, "-c", MAKE_SHARDS], input=pickle.dumps((job, [4, 1, 1])), capture_output=True, check=True
    )
    names = ["sampled-000001.tar", "sampled-000004.tar", "topk-000001.tar", "topk-000004.tar"]
    assert sorted(path.name for path in context.folder.glob("*.tar")) == names, elsewhere.stderr
    made = [context.folder / name for name in names]
    then = [path.stat().st_mtime_ns for path in made]
    second = carry_out(tiny, CACHE)
    assert [path.stat().st_mtime_ns for path in made] == then
    assert [_digests(second, name) for name in BOTH_NAMES] == [_digests(first, name) for name in BOTH_NAMES]
    assert second.facts == first.facts


MAKE_SHARDS = """
import pickle, sys
from capgap.pipeline.cache.shards import ShardScorer

job, shards = pickle.load(sys.stdin.buffer)
scorer = ShardScorer(job)
for index in shards:
    scorer.make(index)
scorer.close()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's build for GPUs does not run on a CPU")
def test_how_rows_leave_vllm_and_how_many_devices_share_the_teacher_reach_the_engine(run, teacher_folder) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    public = stage.prepare(_context(run(engine="vllm", capture="public")))
    with pytest.raises(SettingError, match=r"cache\.recording: .*\(cache\.capture: public\); found sampled"):
        ShardScorer(dataclasses.replace(public, teacher=teacher_folder())).score(0)
    # four heads are not to be had on three devices
    spread = stage.prepare(_context(run(engine="vllm", tensor_parallel=3)))
    with pytest.raises(MachineError, match=r"the teacher could not be started; found .*tensor parallel size \(3\)"):
        ShardScorer(dataclasses.replace(spread, teacher=teacher_folder())).score(0)


def test_under_the_rule_document_each_document_is_scored_by_itself(inputs, tmp_path) -> None:
    settings = TOPK | {"profile": "lossless", "max_tokens": 1, "top_k": 300}
    tiny = RunFile.model_validate(
        inputs
        | {"out": str(tmp_path / "out"), "corpus": inputs["corpus"] | {"context": "document"}}
        | {"cache": inputs["cache"] | settings}
    )
    for instance in (CORPUS, TEACHER):
        carry_out(tiny, instance)
    manifest = carry_out(tiny, CACHE)
    assert manifest.facts["context"] == "document"
    sequences, targets = _reader(tiny, manifest, "topk").read(0)
    model = LlamaForCausalLM.from_pretrained(inputs["teacher"]["path"])
    num_documents, differing = 0, 0
    for b, (tokens_L1, starts_L1) in enumerate(zip(sequences.tokens_BL1, sequences.starts_BL1, strict=True)):
        bounds = sorted({0, SEQ_LEN, *np.flatnonzero(starts_L1[:SEQ_LEN]).tolist()})
        for first, end in itertools.pairwise(bounds):
            alone = torch.from_numpy(tokens_L1[None, first:end]).long()
            with torch.inference_mode():
                expected_LV = torch.log_softmax(model(alone).logits[0, :, :300].double(), -1).numpy()
            found_LV = np.empty((end - first, 300))
            np.put_along_axis(
                found_LV, targets.ids_BLK[b, first:end].astype(int), targets.logprobs_BLK[b, first:end], 1
            )
            # float32, in batches of other shapes
            assert np.abs(found_LV - expected_LV).max() < 1e-4
            # the last target of a document is about what follows it, whatever does
            labels_L = expected_LV[np.arange(end - first), tokens_L1[first + 1 : end + 1]]
            assert np.abs(targets.label_logprobs_BL[b, first:end] - labels_L).max() < 1e-4
            num_documents += 1
        with torch.inference_mode():
            whole_LV = torch.log_softmax(model(torch.from_numpy(tokens_L1[None, :-1]).long()).logits[0, :, :300], -1)
        labels_L = whole_LV.numpy()[np.arange(SEQ_LEN), tokens_L1[1:]]
        differing += int((np.abs(labels_L - targets.label_logprobs_BL[b]) > 1e-2).sum())
    assert num_documents > len(sequences), "a corpus with a document a sequence would prove nothing"
    assert differing > 0, "or the rule changes nothing"
