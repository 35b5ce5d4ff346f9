"""Tiny real teachers, and sequences for them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_server import KEY, TeacherServer, teacher_server
from tiny_models import PADDED_VOCAB_SIZE, VLLM_HEAD_DIM, save_model, tiny_llama, tiny_vllm_llama
from tiny_texts import numbered_texts, write_texts
from transformers import PreTrainedTokenizerFast

from capgap.pipeline.cache.scoring import Recording, Request
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.stage.context import Instance, StageContext, StageInput
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.run_file import RunFile

VOCAB_SIZE = 300
SEQ_LEN = 48
STAGE_SEQ_LEN = 32


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The folder of a Llama, by default with grouped heads and 20 padding rows behind its vocabulary."""

    def make(
        tied: bool = False,
        max_positions: int = SEQ_LEN,
        head_dim: int = VLLM_HEAD_DIM,
        num_columns: int = PADDED_VOCAB_SIZE,
        num_kv_heads: int = 2,
        broken_id: int | None = None,
    ) -> str:
        folder: Path = tmp_path_factory.mktemp("teacher")
        model = tiny_llama(
            3,
            vocab_size=num_columns,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            initializer_range=0.2,  # the top-1 token has a probability of 0.1 on average, of up to 0.55
            tie_word_embeddings=tied,
        )
        if broken_id is not None:
            model.model.embed_tokens.weight.data[broken_id] = torch.nan
        return save_model(folder, model)

    return make


@pytest.fixture(scope="session")
def recording() -> Callable[..., Recording]:
    def make(
        kind: str = "topk",
        num_ids: int = 16,
        temperature: float = 1.0,
        chunk_rows: int = 1024,
        seed: int = 0,
        vocab_size: int = VOCAB_SIZE,
        extra_temperatures: tuple[float, ...] = (),
    ) -> Recording:
        """`kind`: sampled, topk or both."""
        num_samples, top_k = num_ids if kind != "topk" else 0, num_ids if kind != "sampled" else 0
        return Recording(num_samples, top_k, temperature, seed, vocab_size, chunk_rows, extra_temperatures)

    return make


@pytest.fixture(scope="session")
def requests_of() -> Callable[..., list[Request]]:
    def make(num_sequences: int, vocab_size: int = VOCAB_SIZE) -> list[Request]:
        rng = np.random.default_rng(11)
        return [Request(rng.integers(0, vocab_size, SEQ_LEN + 1, dtype=np.int32)) for _ in range(num_sequences)]

    return make


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> dict[str, Any]:
    """A run with its corpus (ten student shards of at most 8 sequences) and teacher made."""
    folder = tmp_path_factory.mktemp("run")
    texts = numbered_texts(60)
    write_texts(folder, texts)
    tokenizer = train_tokenizer(texts, 300)
    run = {
        "name": "tiny",
        "out": str(folder / "out"),
        "device": "cpu",
        "corpus": {
            "sources": [str(folder / "*.txt")],
            "tokenizer": _save_teacher(folder / "teacher", tokenizer),
            "seq_len": STAGE_SEQ_LEN,
            "teacher_fraction": 0.0,
            "heldout_fraction": 0.2,
            "shard_sequences": 8,
        },
        "teacher": {"path": str(folder / "teacher")},
        "student": {"model": {}},
        # no held-out ones: what is said of shards below is of those that students train on
        "cache": {
            "engine": "transformers",
            "num_samples": 20,
            "chunk_rows": 100,
            "batch_tokens": 200,
            "num_heldout_sequences": 0,
        },
    }
    carry_out(RunFile.model_validate(run), Instance("corpus"))
    carry_out(RunFile.model_validate(run), Instance("teacher"))
    return run


@pytest.fixture(scope="session")
def save_teacher() -> Callable[[Path, PreTrainedTokenizerFast], str]:
    """Saves a teacher with a tokenizer, and returns its folder."""
    return _save_teacher


def _save_teacher(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    return save_model(folder, tiny_vllm_llama(2, STAGE_SEQ_LEN), tokenizer)


@pytest.fixture
def run(inputs, tmp_path) -> Any:
    """A run of its own over the same corpus and teacher; takes settings of the cache."""
    shutil.copytree(inputs["out"], tmp_path / "out")

    def make(**cache: Any) -> RunFile:
        return RunFile.model_validate(inputs | {"out": str(tmp_path / "out"), "cache": inputs["cache"] | cache})

    return make


@pytest.fixture(scope="session")
def whole(inputs, tmp_path_factory) -> str:
    """Digest of the cache's content, made by one process that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    shutil.copytree(inputs["out"], out)
    return carry_out(RunFile.model_validate(inputs | {"out": str(out)}), Instance("cache")).content


@pytest.fixture
def context_of() -> Callable[[RunFile], StageContext]:
    """What the cache stage of a run is handed."""

    def make(run: RunFile) -> StageContext:
        out = Path(run.out)
        (out / "cache" / "work").mkdir(parents=True, exist_ok=True)
        inputs = {name: StageInput(out / name, read_manifest(out / name)) for name in ("corpus", "teacher")}
        return StageContext(run, Instance("cache"), out / "cache", inputs, "cpu")

    return make


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `capgap cache` on a run with more arguments, and kills what is left of it in the end."""
    started: list[subprocess.Popen[str]] = []

    def begin(run: RunFile, *arguments: str) -> subprocess.Popen[str]:
        path = tmp_path / "run.json"
        path.write_text(run.model_dump_json())
        command = [sys.executable, "-m", "capgap.jobs.cli", "cache", str(path), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def server(folder: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[TeacherServer]:
    """The teacher of the module's fixture `folder` behind an endpoint, and its key in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with teacher_server(folder) as started:
        yield started
