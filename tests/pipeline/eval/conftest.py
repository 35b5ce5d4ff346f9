"""Tiny real models, sequences for them, and finished stages of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama
from tiny_targets import targets_of
from transformers import LlamaForCausalLM

from capgap.pipeline.stage.context import Instance, StageContext, StageInput
from capgap.pipeline.store import Block, ShardWriter, codec_for
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK_CODECS, Codec
from capgap.schemas.facts import (
    CacheFacts,
    CorpusFacts,
    ModelFacts,
    RecordingFacts,
    SourceCounts,
    SplitFacts,
    TokenizerFacts,
    heldout_set,
)
from capgap.schemas.manifest import Manifest, ShardSet
from capgap.schemas.records import Sequences, Targets
from capgap.schemas.run_file import RunFile

VOCAB_SIZE = 128
TOKENIZER = TokenizerFacts(fingerprint="f" * 64, vocab_size=128, eos_id=0)
COUNTS = {"num_documents": 6, "num_text_bytes": 480, "num_text_tokens": 144}
TEXT = SplitFacts(**COUNTS, by_source={"somewhere": SourceCounts(**COUNTS, num_labels=144)})


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LlamaForCausalLM]:
    def make(seed: int = 0, rows: int = VOCAB_SIZE, tied: bool = True) -> LlamaForCausalLM:
        return tiny_llama(
            seed,
            vocab_size=rows,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,  # sharp enough that models differ visibly
            tie_word_embeddings=tied,
        ).eval()

    return make


@pytest.fixture(scope="session")
def make_sequences() -> Callable[..., Sequences]:
    def make(num_sequences: int = 6, seq_len: int = 24, masked: bool = True) -> Sequences:
        rng = np.random.default_rng(7)
        shape = (num_sequences, seq_len + 1)
        starts_BL1 = np.zeros(shape, np.bool_)
        starts_BL1[:, 0] = True
        mask_BL1 = rng.random(shape) < 0.8 if masked else np.ones(shape, np.bool_)
        mask_BL1[:, 0] = False
        return Sequences(rng.integers(0, VOCAB_SIZE, shape, dtype=np.int32), starts_BL1, mask_BL1)

    return make


@pytest.fixture(scope="session")
def make_eval_cache() -> Callable[..., StageInput]:
    return _cache


@pytest.fixture(scope="session")
def make_context(make_model, make_sequences) -> Callable[..., StageContext]:
    """The eval stage's context, with finished inputs below a folder; `num_seeds` students of each arm."""

    def make(folder: Path, arms: dict[str, Any], num_seeds: int = 2, **settings: Any) -> StageContext:
        evaluated = {"num_sequences": 5, "num_full_sequences": 2, "num_bootstrap": 200, "batch_sequences": 2}
        evaluated["num_text_samples"] = 0  # the corpus below has no tokenizer to write with
        run = RunFile.model_validate(
            {
                "name": "tiny",
                "out": str(folder),
                "seeds": list(range(num_seeds)),
                "corpus": {},
                "teacher": {"path": "somewhere"},
                "cache": {},
                "student": {"model": {}},
                "arms": arms,
                "eval": evaluated | settings,
            }
        )
        inputs = {"corpus": _corpus(folder / "corpus", make_sequences())}
        teacher = make_model(0, rows=160)
        inputs["teacher"] = _model(folder, "teacher", teacher)
        inputs["cache"] = _cache(folder / "cache", make_sequences(), teacher, {"topk": 16, "sampled": 5}, 1.0)
        for i, arm in enumerate(run.arms):
            for seed in run.seeds:
                name = f"train/{arm}/seed-{seed}"
                # the first student of the arm `distilled` is the teacher itself
                weights = 0 if (arm, seed) == ("distilled", 0) else 10 + 2 * i + seed
                inputs[name] = _model(folder, name, make_model(weights, rows=160))
        (folder / "eval").mkdir()
        return StageContext(run, Instance("eval"), folder / "eval", inputs, "cpu")

    return make


@pytest.fixture(scope="session")
def make_student(make_model) -> Callable[..., StageInput]:
    """A finished training of a model."""
    return _model


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
    blocks = [sequences.part(slice(3)), sequences.part(slice(3, 5))], [sequences.part(slice(5, None))]
    shards = [writer.write(i, [Block(part) for part in parts]) for i, parts in enumerate(blocks)]
    facts = CorpusFacts(
        tokenizer=TOKENIZER,
        context="packed",
        splits={"heldout": TEXT},
        text_sources=("somewhere",),
        whole_conversations=False,
    )
    return StageInput(folder, _manifest("corpus", facts.model_dump(mode="json"), {"heldout": writer.shard_set(shards)}))


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


def _cache(
    folder: Path,
    sequences: Sequences,
    teacher: LlamaForCausalLM,
    kinds: Any,
    temperature: float,
    *,
    unknown_labels: bool = False,
) -> StageInput:
    """Two blocks of held-out sequences with the teacher's own targets; the first of all has no label."""
    folder.mkdir(parents=True)
    length = sequences.tokens_BL1.shape[1] - 1
    sequences.mask_BL1[0] = False
    sets, recordings = {}, {}
    for kind, num_ids in kinds.items():
        codec = Codec(SAMPLED if kind == "sampled" else TOPK_CODECS["lossless"], length, 128, num_ids)
        codec = replace(codec, unknown_labels=unknown_labels)
        writer = ShardWriter(folder, folder / f"sidecars-{kind}", f"heldout-{kind}", codec)
        parts = sequences.part(slice(4)), sequences.part(slice(4, None))
        blocks = [Block(part, _targets(codec, part, teacher, temperature)) for part in parts]
        sets[heldout_set(kind)] = writer.shard_set([writer.write(0, blocks)])
        sets[kind] = ShardWriter(folder, folder / f"sidecars-{kind}", kind, codec).shard_set([])
        recordings[kind] = RecordingFacts(num_ids=num_ids, temperatures=(temperature,))
    facts = CacheFacts(
        tokenizer=TOKENIZER,
        context="packed",
        splits={"heldout": TEXT},
        text_sources=("somewhere",),
        whole_conversations=False,
        temperature=temperature,
        recordings=recordings,
        padded_vocab_size=160,
        num_teacher_parameters=teacher.num_parameters(),
        engines=("transformers 5",),
        dtypes=("float32",),
        mean_label_loss=1.0,
    )
    return StageInput(folder, _manifest("cache", facts.model_dump(mode="json"), sets))


def _targets(codec: Codec, part: Sequences, teacher: LlamaForCausalLM, temperature: float) -> Targets:
    tokens = torch.from_numpy(part.tokens_BL1).long()
    with torch.inference_mode():
        logits_NV = teacher(input_ids=tokens[:, :-1]).logits.flatten(0, 1)[:, :128] / temperature
    return targets_of(codec, logits_NV, tokens[:, 1:], seed=0)
