"""A tiny model without a chat template, conversations that can be learnt, and run files that tune it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_chats import MAX_LEN, conversations, write
from tiny_models import save_model, tiny_llama

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.schemas.run_file import RunFile


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["say 12 it is 345! again 67. 890 how much? be brief\n" * 20], 300)
    model = tiny_llama(
        vocab_size=len(tokenizer) + 1,  # a row of padding, and two to be added for the marks of roles
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("chats")
    return write(folder / "chat.jsonl", [{"messages": messages} for messages in conversations()])


@pytest.fixture(scope="session")
def make_run(base: Path, chats: str) -> Callable[..., RunFile]:
    """A run that tunes the given tiny model into the folder, with other settings of `tune` where they are given."""

    def make(out: Path, **tune: Any) -> RunFile:
        settings: dict[str, Any] = {
            "path": str(base),
            "sources": [chats],
            "max_len": MAX_LEN,
            "heldout_fraction": 0.2,
            "learning_rate": 1e-2,
            "batch_sequences": 4,
            "num_epochs": 10,
            "validate_every_steps": 10,
            "checkpoint_every_steps": 4,
            "loggers": [],
        }
        return RunFile.model_validate(
            {
                "name": "talk",
                "out": str(out),
                "device": "cpu",
                "tune": {name: value for name, value in (settings | tune).items() if value is not None},
            }
        )

    return make
