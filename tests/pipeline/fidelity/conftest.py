"""Caches of planted distributions, and one that a tiny teacher made.

Legend: B sequences, L targets a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_model, tiny_llama
from tiny_targets import targets_of
from tiny_texts import numbered_texts

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.stage.context import Instance, StageInput
from capgap.pipeline.store import Block, ShardWriter
from capgap.pipeline.store.codec import SAMPLED, TOPK_CODECS, Codec
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.facts import CacheFacts, RecordingFacts, TokenizerFacts
from capgap.schemas.manifest import Manifest
from capgap.schemas.records import Sequences, Targets
from capgap.schemas.run_file import RunFile

VOCAB_SIZE, SEQ_LEN = 200, 10


@pytest.fixture(scope="session")
def make_cache() -> Callable[..., StageInput]:
    """A cache whose teacher says the same at every position: `p_V`; `labels` are the real next tokens, one after the
    other, and the mask leaves out every tenth."""

    def make(
        folder: Path,
        p_V: np.ndarray,
        labels: np.ndarray,
        kinds: dict[str, int],
        extra: tuple[float, ...] = (),
        unknown_labels: bool = False,
    ) -> StageInput:
        folder.mkdir(parents=True)
        num_sequences = len(labels) // SEQ_LEN
        labels_BL = labels.reshape(num_sequences, SEQ_LEN).astype(np.int32)
        tokens_BL1 = np.concatenate([np.zeros((num_sequences, 1), np.int32), labels_BL], axis=1)
        mask_BL1 = np.ones(tokens_BL1.shape, np.bool_)
        mask_BL1[:, [0, -1]] = False
        sets, recordings = {}, {}
        for kind, num_ids in kinds.items():
            name = SAMPLED if kind == "sampled" else TOPK_CODECS["lossless"]
            codec = Codec(
                name,
                SEQ_LEN,
                VOCAB_SIZE,
                num_ids,
                extra_temperatures=() if kind == "sampled" else extra,
                unknown_labels=unknown_labels,
            )
            writer = ShardWriter(folder, folder / f"sidecars-{kind}", kind, codec)
            shards = []
            for number, rows in enumerate(np.array_split(np.arange(num_sequences), 4)):
                sequences = Sequences(tokens_BL1[rows], np.zeros_like(mask_BL1[rows]), mask_BL1[rows])
                halves = np.array_split(np.arange(len(rows)), 2)
                blocks = [Block(sequences.part(half), _targets(codec, p_V, labels_BL[rows][half])) for half in halves]
                shards.append(writer.write(number, blocks))
            sets[kind] = writer.shard_set(shards)
            recordings[kind] = RecordingFacts(
                num_ids=num_ids,
                profile=None if kind == "sampled" else "lossless",
                temperatures=(1.0,) if kind == "sampled" else tuple(sorted((1.0, *extra))),
            )
        facts = CacheFacts(
            tokenizer=TokenizerFacts(fingerprint="f" * 64, vocab_size=VOCAB_SIZE, eos_id=0),
            context="packed",
            splits={},
            text_sources=("somewhere",),
            whole_conversations=False,
            temperature=1.0,
            recordings=recordings,
            padded_vocab_size=VOCAB_SIZE,
            num_teacher_parameters=None,
            engines=("planted",),
            dtypes=("float32",),
            mean_label_loss=0.0,
        )
        return StageInput(folder, _manifest(facts, sets))

    return make


def _manifest(facts: CacheFacts, sets: dict[str, Any]) -> Manifest:
    return Manifest(
        stage="cache", instance="cache", identity="0" * 64, content="1" * 64, settings={}, inputs={}, files=(),
        versions={}, command=(), started="2026-01-01T00:00:00Z", wall_s=1.0, facts=facts.model_dump(mode="json"),
        shard_sets=sets,
    )  # fmt: skip


def _targets(codec: Codec, p_V: np.ndarray, labels_BL: np.ndarray) -> Targets:
    logits_NV = torch.from_numpy(np.log(p_V)).float().repeat(labels_BL.size, 1)
    return targets_of(codec, logits_NV, torch.from_numpy(labels_BL.astype(np.int64)), seed=labels_BL.size)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a finished cache, of both recordings, and of the teacher that made it."""
    folder = tmp_path_factory.mktemp("fidelity")
    texts = numbered_texts(20)
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_text(text)
    teacher = tiny_llama(2, max_position_embeddings=32, initializer_range=0.2)
    save_model(folder / "given", teacher, train_tokenizer(texts, 300))
    run = RunFile.model_validate(
        {
            "name": "tiny",
            "out": str(folder / "out"),
            "device": "cpu",
            "corpus": {
                "sources": [str(folder / "*.txt")], "tokenizer": str(folder / "given"), "seq_len": 32,
                "teacher_fraction": 0.0, "heldout_fraction": 0.2, "shard_sequences": 8, "long_documents": "split",
            },
            "teacher": {"path": str(folder / "given")},
            "student": {"model": {}},
            "cache": {
                "engine": "transformers", "recording": "both", "num_samples": 30, "top_k": 40, "temperature": 1.0,
                "extra_temperatures": [2.0], "profile": "lossless",
            },
        }
    )  # fmt: skip
    for stage in ("corpus", "teacher", "cache"):
        carry_out(run, Instance(stage))
    return {name: folder / "out" / name for name in ("corpus", "teacher", "cache")} | {"given": folder / "given"}
