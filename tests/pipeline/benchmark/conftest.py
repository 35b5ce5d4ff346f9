"""A tiny model that has learnt a little, and local tasks that it is neither sure nor clueless of."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VLLM_HEAD_DIM, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capgap.pipeline.models.load import save_model
from capgap.pipeline.stage.context import Instance, StageContext, StageInput
from capgap.schemas.facts import ModelFacts, TokenizerFacts
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

# read when `datasets` is imported, which the stage does late: nothing is left in the home of whoever tests
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="capgap-datasets-")

TASKS = Path(__file__).parents[2] / "assets" / "benchmarks"
ANIMALS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")
MAX_POSITIONS = 64


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that was shown for a moment which animal follows which, and that a full stop comes next."""
    words = ["<eos>", "<unk>", *ANIMALS, "after", "comes", ".", "\n", "Q", "A", ":"]
    vocabulary = {word: number for number, word in enumerate(words)}
    backing = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backing.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
    )
    backing.decoder = decoders.WordPiece(prefix="")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backing, eos_token="<eos>", unk_token="<unk>")
    model = tiny_llama(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=64,
        head_dim=VLLM_HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lines = [f"after {one} comes {other} .\n" for one, other in itertools.pairwise(ANIMALS)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(12):
            shown = [int(i) for i in torch.randint(len(lines), (16, 8)).flatten()]
            ids = torch.tensor(tokenizer("".join(lines[i] for i in shown)).input_ids).view(16, -1)[:, :MAX_POSITIONS]
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    folder: Path = tmp_path_factory.mktemp("model")
    save_model(model.eval(), tokenizer, folder)
    return folder


@pytest.fixture
def make_context(model_folder: Path, tmp_path: Path) -> Callable[..., StageContext]:
    """The benchmark stage of a student at hand, with these settings of `benchmarks`."""

    def make(name: str = "benchmark", **settings: Any) -> StageContext:
        settings = {"tasks": {"animals": {}}, "include_path": str(TASKS), **settings}
        values = {"name": "tiny", "out": str(tmp_path), "corpus": {}, "teacher": {"path": "somewhere"}}
        values |= {"student": {"model": {}}, "train": {}}
        # small, so that vLLM computes a prompt in parts
        run = RunFile.model_validate({**values, "cache": {"chunk_rows": 16}, "benchmarks": settings})
        facts = ModelFacts(
            tokenizer=TokenizerFacts(fingerprint="f" * 64, vocab_size=17, eos_id=0),
            num_parameters=1,
            num_non_embedding_parameters=1,
            padded_vocab_size=17,
            max_positions=MAX_POSITIONS,
            path=str(model_folder),
        )
        trained = "train/distilled/seed-0"
        manifest = Manifest(
            stage="train",
            instance=trained,
            settings={},
            inputs={},
            identity="0" * 64,
            content="1" * 64,
            files=(),
            facts=facts.model_dump(mode="json"),
            versions={},
            started="2026-01-01T00:00:00Z",
            wall_s=1.0,
            command=(),
        )
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        instance = Instance("benchmark", arm="distilled", seed=0)
        return StageContext(run, instance, folder, {trained: StageInput(model_folder, manifest)}, "cpu")

    return make
