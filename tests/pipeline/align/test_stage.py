"""Two byte-level BPEs on one corpus: a cache is aligned, killed and resumed, refused, and trained from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_chats import conversations, write
from tiny_models import save_model, tiny_llama
from tiny_runs import NEEDED, SEQ_LEN, salted_texts, settings_in, settings_of

import capgap
from capgap.pipeline.align import units
from capgap.pipeline.api import DistillationLoss
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.fidelity.fidelity import measure_cache
from capgap.pipeline.fidelity.sample import Sampling
from capgap.pipeline.models.load import load_model
from capgap.pipeline.stage.context import Instance, Slice
from capgap.pipeline.store import Batch, read_blocks
from capgap.pipeline.train.preflight import require_trainable
from capgap.pipeline.verify.verify import verify
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.graph import instances
from capgap.pipeline.workflow.slices import carry_out_slice
from capgap.schemas.errors import CapgapError, MismatchError, SettingError
from capgap.schemas.facts import CacheFacts
from capgap.schemas.records import ChunkTargets, TopkTargets
from capgap.schemas.results import EvalResults
from capgap.schemas.run_file import RunFile

ALIGN = Instance("align")
SHARDS = {"corpus": {"shard_sequences": 32}, "cache": {"engine": "transformers", "recording": "topk", "top_k": 8}}


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished cache of several shards, and the settings of its run."""
    folder = tmp_path_factory.mktemp("cached")
    settings = settings_of(folder, "aligned")
    for name, values in SHARDS.items():
        settings[name] = settings[name] | values
    del settings["cache"]["num_samples"]
    for instance in NEEDED[:3]:
        carry_out(RunFile.model_validate(settings), instance)
    train_tokenizer(salted_texts("aligned"), 270).save_pretrained(folder / "other")
    return folder, settings


def students(cached: tuple[Path, dict[str, Any]], out: Path, tokenizer: str = "other", **align: Any) -> dict[str, Any]:
    folder, settings = cached
    kept = {name: settings[name] for name in ("name", "device", "seeds", "student", "train", "arms")}
    align = {"tokenizer": str(folder / tokenizer)} | align
    return kept | {"out": str(out), "reuse": {"cache": str(folder / "out" / "cache")}, "align": align}


def test_one_tokenizer_makes_chunks_of_tokens_with_the_very_logprobs(
    cached: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = RunFile.model_validate(students(cached, tmp_path, "given"))
    manifest = carry_out(run, ALIGN)
    original = capgap.open_cache(cached[0] / "out" / "cache")
    # later shards begin within a document, whose rest by itself may be cut otherwise
    first = [
        one.model_copy(update={"shards": one.shards[:1]})
        for one in (original.manifest.shard_sets["topk"], manifest.shard_sets["chunks"])
    ]
    known: dict[bytes, Any] = {}
    for sequences, targets in read_blocks(original.location, first[0]):
        assert isinstance(targets, TopkTargets)
        known |= dict(zip(map(bytes, sequences.tokens_BL1), targets.label_logprobs_BL, strict=True))
    num_same = 0
    for sequences, targets in read_blocks(tmp_path / "align", first[1]):
        assert isinstance(targets, ChunkTargets)
        for row, tokens_L1 in enumerate(sequences.tokens_BL1):
            if bytes(tokens_L1) in known:
                assert targets.ends_BL[row].all() and targets.kept_BL[row].all()
                assert np.array_equal(targets.logprobs_BL[row], known[bytes(tokens_L1)])
                num_same += 1
    # the last document of the shard is cut, and so may be its last token
    assert num_same >= first[0].num_sequences - 1 > 0
    facts = CacheFacts.model_validate(manifest.facts)
    assert facts.aligned is not None and facts.aligned.num_unreliable_chunks < facts.aligned.num_chunks / 100


def test_a_killed_stage_goes_on_and_slices_make_the_same_bytes(
    cached: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFile.model_validate(students(cached, tmp_path / "one"))
    make, made = units.ChunkAligner.make, []

    def killed(self: units.ChunkAligner, unit: int) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(unit)
        return make(self, unit)

    monkeypatch.setattr(units.ChunkAligner, "make", killed)
    with pytest.raises(KeyboardInterrupt):
        carry_out(run, ALIGN)
    monkeypatch.undo()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "align").glob("*.tar")}
    assert len(stamps) == 2
    manifest = carry_out(run, ALIGN)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    other = RunFile.model_validate(students(cached, tmp_path / "two"))
    assert carry_out_slice(other, ALIGN, Slice(0, 2)) is None
    sliced = carry_out_slice(other, ALIGN, Slice(1, 2))
    assert sliced is not None and sliced.shard_sets == manifest.shard_sets
    assert any("sound" in line for line in verify(tmp_path / "two"))
    with pytest.raises(CapgapError, match="aligned cache"):
        measure_cache(str(tmp_path / "one" / "align"), Sampling())
    again = students(cached, tmp_path / "three") | {"reuse": {"cache": str(tmp_path / "one" / "align")}}
    with pytest.raises(CapgapError, match="cannot be aligned"):
        carry_out(RunFile.model_validate(again), ALIGN)


def test_a_cache_of_conversations_is_refused_whatever_their_template_is(tmp_path: Path) -> None:
    # a template without a prompt for an answer tells no end of answers, whose facts then have none
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}[a] {% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}[u] {{ m.content }}{% endif %}\n{% endfor %}"
    )
    tokenizer = train_tokenizer(["say 12 it is 345! again [u] [a]"] * 9, 290)
    tokenizer.chat_template = template
    save_model(tmp_path / "given", tiny_llama(2, max_position_embeddings=SEQ_LEN), tokenizer)
    settings = settings_in(tmp_path, SEQ_LEN)
    source = write(tmp_path / "chat.jsonl", [{"messages": messages} for messages in conversations()])
    settings["corpus"] |= {"sources": [source], "messages_field": "auto"}
    run = RunFile.model_validate(settings | {"align": {"tokenizer": str(tmp_path / "given")}})
    for instance in NEEDED[:3]:
        facts = carry_out(run, instance).facts
    assert facts["turn_end_ids"] == [] and facts["has_conversations"]
    with pytest.raises(MismatchError, match="cannot be aligned; found conversations"):
        carry_out(run, ALIGN)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"divergence": "jsd"}, "divergence"),
        ({"tail": "ghost"}, "tail"),
        ({"token_weights": "entropy"}, "token_weights"),
        ({"recording": "topk"}, "recording"),
    ],
)
def test_what_chunks_do_not_support_is_refused_by_name(
    cached: tuple[Path, dict[str, Any]], tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    settings = students(cached, tmp_path)
    with pytest.raises(ValueError, match=f"{named}: found"):
        RunFile.model_validate(settings | {"train": settings["train"] | changed})


def test_a_loop_of_ones_own_trains_from_an_aligned_cache(cached: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run = RunFile.model_validate(students(cached, tmp_path, projected_top_k=4))
    carry_out(run, ALIGN)
    carry_out(run, Instance("student", seed=1))
    cache = capgap.open_cache(tmp_path / "align")
    assert "chunks to learn from" in repr(cache) and "% of the targets have projected top-k tokens" in repr(cache)
    model = load_model(str(tmp_path / "student/seed-1/model"), "cpu")
    loss = DistillationLoss(model, cache, alpha=0.5, temperature=2.0)
    batch = next(iter(cache.batches(4)))
    found = loss(batch)
    found.loss.backward()
    assert found.kl_N is not None and np.isfinite(found.loss.item())
    num_labels = int((batch.labels_BL >= 0).sum())
    assert batch.chunk_left_N is not None
    # what is in no chunk is learnt from the text alone, and counts as much as the rest
    weight_N = torch.where(batch.chunk_left_N < 0, 1.0, 0.5)
    assert set(weight_N[batch.labels_BL.flatten() >= 0].tolist()) == {0.5, 1.0}
    expected = (0.5 * found.kl_N.sum() + (weight_N * found.ce_N).sum()).item() / num_labels
    assert expected == pytest.approx(found.loss.item(), rel=1e-5)
    with pytest.raises((SettingError, CapgapError)):
        DistillationLoss(model, cache, tail="ghost")
    more = DistillationLoss(model, cache, alpha=0.5, temperature=2.0, projected_weight=0.25)(batch).loss - found.loss
    # float32 sums in another order
    assert more.item() == pytest.approx(0.25 * projected_kl(model, batch) / num_labels, rel=1e-4)


@torch.no_grad()
def projected_kl(model: Any, batch: Batch) -> float:
    """The sum over projected targets, in float64 and over the whole vocabulary."""
    assert batch.ids_NK is not None and batch.weights_NK is not None and batch.tail_N is not None
    q_NV = model(input_ids=batch.input_ids_BL).logits.double().softmax(-1).flatten(0, 1)
    p_NK, tail_N = batch.weights_NK.double(), batch.tail_N.double()
    q_NK = q_NV.gather(1, batch.ids_NK).where(p_NK > 0, 0)
    rest_N = 1 - q_NK.sum(-1)
    cells_N = (torch.xlogy(p_NK, p_NK) - torch.xlogy(p_NK, q_NK)).sum(-1)
    cells_N += torch.xlogy(tail_N, tail_N) - torch.xlogy(tail_N, rest_N)
    has_N = p_NK.amax(-1) > 0
    assert 0 < int(has_N.sum()) < len(has_N)
    return float(cells_N[has_N].sum())


def test_projected_targets_that_are_not_there_are_refused(cached: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    settings = students(cached, tmp_path)
    learning = settings["train"] | {"alpha": 0.5, "projected_weight": 0.5}
    with pytest.raises(ValueError, match=r"without align\.projected_top_k"):
        RunFile.model_validate(settings | {"train": learning})
    # cross-entropy alone asks for nobody's targets
    RunFile.model_validate(settings | {"train": learning | {"alpha": 0.0}, "arms": {"one": {}}})
    given = {name: value for name, value in settings.items() if name != "align"} | {"train": learning}
    with pytest.raises(MismatchError, match="only an aligned cache has projected targets"):
        require_trainable(RunFile.model_validate(given))
    carry_out(RunFile.model_validate(settings), ALIGN)
    given["reuse"] = {"cache": str(tmp_path / "align")}
    with pytest.raises(MismatchError, match="the aligned cache has no projected targets"):
        require_trainable(RunFile.model_validate(given))


@pytest.mark.slow
def test_a_student_of_another_tokenizer_is_trained_and_measured_in_bits_per_byte(
    cached: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = RunFile.model_validate(students(cached, tmp_path) | {"eval": {}})
    for instance in instances(run):
        carry_out(run, instance)
    results = EvalResults.model_validate_json((tmp_path / "eval" / "results.json").read_text())
    assert results.cached is not None and results.cached.recording == "chunks"
    assert results.cached.teacher_bits_per_byte is not None and results.cached.teacher_loss is None
    for model in results.models:
        assert model.against_cache is not None and model.against_cache.kl is None and model.against_cache.top1 is None
        assert model.against_cache.chunk_kl is not None and model.against_cache.chunk_kl > 0
        assert model.bits_per_byte > 0
    text = (tmp_path / "report" / "report.html").read_text()
    assert "KL by token does not exist" in text and "bits per byte" in text
