"""A teacher that can be written down: after each token, a row of a table of logits. Its captures, as rows and as files.

Legend: V vocabulary, M tokens of a row, T = M - 1 targets, K kept ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.models.tokenizers import tokenizer_facts
from capgap.schemas.interchange import ImportSettings

NUM_KEPT = 8
LENGTHS = (9, 14, 20, 33, 12, 25)


@dataclass(frozen=True)
class Teacher:
    """Rows of text and what the teacher says of them.

    Attributes:
        tokenizer: folder of the tokenizer.
        vocab_size: of it.
        eos_id: of it.
        rows: by row `input_ids`, `ids`, `logprobs` and `label_logprobs`.
    """

    tokenizer: Path
    vocab_size: int
    eos_id: int
    rows: list[dict[str, Any]]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    words = [f"{a}{b}{c}" for a in "bdgklmn" for b in "aeiou" for c in "rstpx"]
    train_tokenizer([" ".join(words), *words], 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(tokenizer_folder: Path) -> Teacher:
    from capgap.pipeline.models.tokenizers import load_tokenizer

    facts = tokenizer_facts(load_tokenizer(tokenizer_folder))
    rng = np.random.default_rng(3)
    logits_VV = rng.normal(size=(facts.vocab_size, facts.vocab_size)) * 3
    logprobs_VV = (logits_VV - np.log(np.exp(logits_VV).sum(axis=1, keepdims=True))).astype(np.float32)
    rows = []
    for number in range(60):
        tokens = [int(rng.integers(facts.vocab_size))]
        while len(tokens) < LENGTHS[number % len(LENGTHS)]:
            probs_V = np.exp(logprobs_VV[tokens[-1]].astype(np.float64))
            tokens.append(int(rng.choice(facts.vocab_size, p=probs_V / probs_V.sum())))
        logprobs_TV = logprobs_VV[tokens[:-1]]
        ids_TK = np.argsort(-logprobs_TV, axis=1, kind="stable")[:, :NUM_KEPT]
        rows.append(
            {
                "input_ids": tokens,
                "ids": ids_TK.tolist(),
                "logprobs": np.take_along_axis(logprobs_TV, ids_TK, axis=1).tolist(),
                "label_logprobs": logprobs_TV[np.arange(len(tokens) - 1), tokens[1:]].tolist(),
            }
        )
    return Teacher(tokenizer_folder, facts.vocab_size, facts.eos_id, rows)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A Parquet file of these rows."""

    def made(rows: list[dict[str, Any]], name: str = "captures.parquet", columns: tuple[str, ...] = ()) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        chosen = columns or tuple(rows[0])
        pa.parquet.write_table(pa.Table.from_pylist([{name: row[name] for name in chosen} for row in rows]), path)
        return path

    return made


@pytest.fixture
def settings_for(teacher: Teacher, tmp_path: Path) -> Callable[..., ImportSettings]:
    """Settings of an import of these captures, others where they are given."""

    def made(*sources: Path, **others: Any) -> ImportSettings:
        given = {
            "sources": tuple(map(str, sources)),
            "out": str(tmp_path / "imported"),
            "tokenizer": str(teacher.tokenizer),
            "teacher": "someone/teacher",
            "heldout_fraction": 0.3,
            "shard_sequences": 8,
        }
        return ImportSettings.model_validate(given | others)

    return made
