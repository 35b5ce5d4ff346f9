"""The smallest runs that go through the stages themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import save_model, tiny_llama
from tiny_texts import numbered_texts, write_texts

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.run_file import RunFile

SEQ_LEN = 32
TRAIN = Instance("train", "distilled", 1)
NEEDED = (Instance("corpus"), Instance("teacher"), Instance("cache"), Instance("student", seed=1))


def save_teacher(folder: Path, texts: list[str], seed: int) -> int:
    """A teacher of fresh weights with a tokenizer of the texts, and the number of ids."""
    tokenizer = train_tokenizer(texts, 300)
    # sharp: there is something to learn
    save_model(folder, tiny_llama(seed, max_position_embeddings=SEQ_LEN, initializer_range=0.3), tokenizer)
    return len(tokenizer)


def salted_texts(salt: str) -> list[str]:
    return numbered_texts(60, f"{salt} {{i}} is", 30)


def settings_of(folder: Path, salt: str) -> dict[str, Any]:
    texts = salted_texts(salt)
    write_texts(folder, texts)
    save_teacher(folder / "given", texts, 2)
    return settings_in(folder, SEQ_LEN) | {
        "train": {"batch_sequences": 4, "log_every_steps": 2, "max_tokens": 30 * 4 * SEQ_LEN},
        "arms": {"distilled": {}, "cross_entropy": {"alpha": 0.0, "max_tokens": 2 * 4 * SEQ_LEN}},
    }


def settings_in(folder: Path, seq_len: int) -> dict[str, Any]:
    """Those of the smallest run, without its trainings: its texts and the teacher `given` are in the folder."""
    return {
        "name": "tiny",
        "out": str(folder / "out"),
        "device": "cpu",
        "seeds": [1],
        "corpus": {
            "sources": [str(folder / "*.txt")],
            "tokenizer": str(folder / "given"),
            "seq_len": seq_len,
            "teacher_fraction": 0.0,
            "heldout_fraction": 0.2,
        },
        "teacher": {"path": str(folder / "given")},
        "cache": {"engine": "transformers", "num_samples": 20},
        "student": {"model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}},
    }


def train(run: dict[str, Any], **settings: Any) -> dict[str, str]:
    """Digests of what a training of three steps made."""
    train = run["train"] | {"max_tokens": 3 * 4 * SEQ_LEN} | settings
    manifest = carry_out(RunFile.model_validate(run | {"train": train}), TRAIN, remake=True)
    return {file.path: file.sha256 for file in manifest.files if file.path.endswith(".safetensors")}
