"""A tiny run on this machine's CPU, made once, and the zygote that forks `capgap` upon it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inputs
import pytest
from processes import Zygote
from tiny_models import save_model, tiny_vllm_llama
from tiny_texts import numbered_texts, write_texts

from capgap.jobs.cli import main
from capgap.pipeline.corpus.tokenizer import train_tokenizer

SEQ_LEN = 32


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("logs"))
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run file over sixty short texts and a given teacher: twenty shards, a checkpoint every third step."""
    folder = tmp_path_factory.mktemp("given")
    texts = numbered_texts(60)
    write_texts(folder / "texts", texts)
    save_model(folder / "teacher", tiny_vllm_llama(2, SEQ_LEN), train_tokenizer(texts, 300))
    return {
        "name": "tiny",
        "out": str(folder / "nowhere"),
        "device": "cpu",
        "corpus": {
            "sources": [str(folder / "texts")],
            "tokenizer": str(folder / "teacher"),
            "seq_len": SEQ_LEN,
            "teacher_fraction": 0.0,
            "heldout_fraction": 0.2,
            "shard_sequences": 8,
        },
        "teacher": {"path": str(folder / "teacher")},
        "cache": {"engine": "transformers", "num_samples": 20, "chunk_rows": 100, "batch_tokens": 200},
        "student": {"model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}},
        "train": {
            "batch_sequences": 4,
            "num_epochs": 3,
            "validate_every_steps": 20,
            "num_validation_sequences": 8,
            "checkpoint_every_steps": 3,
        },
        "eval": {"num_sequences": 8, "num_full_sequences": 4, "num_bootstrap": 100},
    }


@pytest.fixture(scope="session")
def run_file(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run-file") / "run.json"
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="session")
def made(zygote: Zygote, run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder with every stage up to the training finished, and nothing disturbed."""
    out = tmp_path_factory.mktemp("made") / "out"
    for stage in ("corpus", "teacher", "cache", "student", "train"):
        code, said = zygote.run(stage, run_file, "--out", out)
        assert code == 0, said
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Qwen's kind with its tokenizer and chat template."""
    return inputs.save(tmp_path_factory.mktemp("base") / "base", inputs.qwen())


@pytest.fixture
def typed(tmp_path: Path, base_model: Path, capsys: pytest.CaptureFixture[str]) -> inputs.Typed:
    """The command as people type it, in a folder of its own, and in this process."""

    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return inputs.Typed(tmp_path, base_model, run)
