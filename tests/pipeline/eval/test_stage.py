from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from capgap.pipeline.eval import stage
from capgap.pipeline.models import load_model
from capgap.pipeline.store import Block, ShardWriter, codec_for
from capgap.pipeline.store.codec import SEQUENCES
from capgap.pipeline.workflow.context import Instance, StageContext, StageInput
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.facts import CorpusFacts, ModelFacts, SplitFacts, TokenizerFacts
from capgap.schemas.manifest import Manifest, ShardSet
from capgap.schemas.records import Sequences
from capgap.schemas.results import EvalResults
from capgap.schemas.run_file import RunFile

TOKENIZER = TokenizerFacts(fingerprint="f" * 64, vocab_size=128, eos_id=0)


def _manifest(name: str, facts: dict[str, Any], shard_sets: dict[str, ShardSet] | None = None) -> Manifest:
    empty = {"settings": {}, "inputs": {}, "files": (), "versions": {}, "command": ()}
    return Manifest(
        stage=name.split("/")[0],
        instance=name,
        identity="0" * 64,
        content="1" * 64,
        started="2026-01-01T00:00:00Z",
        wall_s=1.0,
        facts=facts,
        shard_sets=shard_sets or {},
        **empty,
    )


def _corpus(folder: Path, sequences: Sequences) -> StageInput:
    folder.mkdir()
    codec = codec_for(SEQUENCES, sequences.tokens_BL1.shape[1] - 1, {"vocab_size": 128, "num_ids": 0})
    writer = ShardWriter(folder, folder / "sidecars", "heldout", codec)
    blocks = [_part(sequences, 0, 3), _part(sequences, 3, 5)], [_part(sequences, 5, len(sequences))]
    shards = [writer.write(i, [Block(part) for part in parts]) for i, parts in enumerate(blocks)]
    splits = {"heldout": SplitFacts(num_documents=6, num_text_bytes=480, num_text_tokens=144)}
    facts = CorpusFacts(tokenizer=TOKENIZER, splits=splits)
    return StageInput(folder, _manifest("corpus", facts.model_dump(mode="json"), {"heldout": writer.shard_set(shards)}))


def _part(sequences: Sequences, start: int, stop: int) -> Sequences:
    return Sequences(sequences.tokens_BL1[start:stop], sequences.starts_BL1[start:stop], sequences.mask_BL1[start:stop])


def _model(folder: Path, name: str, model: LlamaForCausalLM, tokenizer: TokenizerFacts = TOKENIZER) -> StageInput:
    model.save_pretrained(folder / name / "model")
    facts = ModelFacts(
        tokenizer=tokenizer,
        num_parameters=model.num_parameters(),
        num_non_embedding_parameters=model.num_parameters(exclude_embeddings=True),
        padded_vocab_size=model.config.vocab_size,
        max_positions=64,
        path="model",
    )
    return StageInput(folder / name, _manifest(name, facts.model_dump(mode="json")))


@pytest.fixture
def context(tmp_path, make_model, make_sequences) -> StageContext:
    run = RunFile.model_validate(
        {
            "name": "tiny",
            "out": str(tmp_path),
            "seeds": [0, 1],
            "teacher": {"path": "somewhere"},
            "student": {"model": {}},
            "arms": {"cross_entropy": {"alpha": 0}, "distilled": {}},
            "eval": {"num_sequences": 5, "num_full_sequences": 2, "num_bootstrap": 200, "batch_sequences": 2},
        }
    )
    inputs = {"corpus": _corpus(tmp_path / "corpus", make_sequences())}
    inputs["teacher"] = _model(tmp_path, "teacher", make_model(0, rows=160))
    for i, arm in enumerate(run.arms):
        for seed in run.seeds:
            name = f"train/{arm}/seed-{seed}"
            # the first student of the second arm is the teacher itself
            weights = 0 if (i, seed) == (1, 0) else 10 + 2 * i + seed
            inputs[name] = _model(tmp_path, name, make_model(weights, rows=160))
    folder = tmp_path / "eval"
    folder.mkdir()
    return StageContext(run, Instance("eval"), folder, inputs, "cpu")


def test_the_stage_measures_every_model(context, make_sequences):
    result = stage.run(context)
    assert [path.name for path in context.folder.iterdir()] == ["results.json"]
    found = EvalResults.model_validate_json((context.folder / "results.json").read_bytes())
    mask = make_sequences().mask_BL1[:, 1:]
    assert result.totals == {"models": 5, "sequences": 5, "labels": mask[:5].sum(), "full_sequences": 2}
    assert (found.num_labels, found.num_full_labels) == (mask[:5].sum(), mask[:2].sum())
    assert [model.name for model in found.models] == ["teacher", *(n for n in context.inputs if n.startswith("train"))]
    assert found.arms == ("cross_entropy", "distilled")
    for model in found.models:
        assert model.loss_interval.low < model.loss < model.loss_interval.high
        assert model.perplexity == pytest.approx(math.exp(model.loss))
        assert model.bits_per_byte == pytest.approx(model.loss * 144 / 480 / math.log(2))


def test_losses_and_differences_equal_a_direct_computation(context, make_model, make_sequences):
    stage.run(context)
    found = EvalResults.model_validate_json((context.folder / "results.json").read_bytes())
    sequences = _part(make_sequences(), 0, 5)
    tokens = torch.from_numpy(sequences.tokens_BL1).long()
    with torch.inference_mode():
        logprobs = make_model(0, rows=160)(input_ids=tokens[:, :-1]).logits[..., :128].double().log_softmax(-1)
    losses = -logprobs.gather(2, tokens[:, 1:, None]).squeeze(2).numpy()
    direct = losses[sequences.mask_BL1[:, 1:]].mean()
    assert found.teacher.loss == pytest.approx(direct, rel=1e-6)
    by_name = {model.name: model.loss for model in found.models}
    for one in found.paired:
        expected = by_name[f"train/{one.first}/seed-{one.seed}"] - by_name[f"train/{one.second}/seed-{one.seed}"]
        assert one.difference == pytest.approx(expected, abs=1e-12)
        assert one.interval.low < one.difference < one.interval.high
    (over,) = found.over_seeds
    assert over.difference == pytest.approx(np.mean([one.difference for one in found.paired]))
    assert over.seeds == (0, 1)


def test_a_student_that_is_the_teacher_is_recognised(context):
    stage.run(context)
    found = EvalResults.model_validate_json((context.folder / "results.json").read_bytes())
    twin, other = found.of_arm("distilled")
    assert found.teacher.against_teacher is None
    assert (twin.loss, twin.against_teacher.kl, twin.against_teacher.top1) == (found.teacher.loss, 0, 1)
    assert other.against_teacher.kl > 0.1


def test_one_model_is_loaded_at_a_time(context, monkeypatch):
    alive: list[int] = []

    def load_and_count(*arguments: Any) -> LlamaForCausalLM:
        alive.append(sum(type(one) is LlamaForCausalLM for one in gc.get_objects()))
        return load_model(*arguments)

    monkeypatch.setattr(stage, "load_model", load_and_count)
    gc.collect()
    stage.run(context)
    assert alive == [0] * 5


def test_another_tokenizer_is_refused(context, tmp_path, make_model):
    other = TOKENIZER.model_copy(update={"fingerprint": "a" * 64})
    name = "train/distilled/seed-1"
    context.inputs[name] = _model(tmp_path / "other", name, make_model(3), other)
    with pytest.raises(MismatchError, match=f"{name}: the tokenizer is not the corpus's"):
        stage.run(context)


def test_a_broken_student_is_named_and_leaves_nothing(context, tmp_path, make_model):
    model = make_model(3)
    torch.nn.init.constant_(model.model.norm.weight, float("inf"))
    name = "train/distilled/seed-1"
    context.inputs[name] = _model(tmp_path / "broken", name, model)
    with pytest.raises(InputError, match=f"{name}: the loss of held-out sequence 0"):
        stage.run(context)
    assert not list(context.folder.iterdir())
