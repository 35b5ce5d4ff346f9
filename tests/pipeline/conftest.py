"""A folder of texts, and run files that make a corpus of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capgap.schemas.run_file import RunFile

NUM_TEXTS = 60


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty short texts of made-up words, no two alike."""
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(5)
    words = ["".join(rng.choice(list("aeioubcdfglmnprst"), size)) for size in rng.integers(2, 9, 300)]
    for number in range(NUM_TEXTS):
        lines = (" ".join(rng.choice(words, 12)) for _ in range(int(rng.integers(5, 25))))
        (folder / f"{number:02d}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def make_corpus_run(texts: Path, tmp_path: Path) -> Callable[..., RunFile]:
    """A run file over the texts, with other settings of `corpus` where they are given."""

    def make(out: str = "out", **corpus: Any) -> RunFile:
        settings = {"sources": [str(texts)], "vocab_size": 400, "seq_len": 32, "shard_sequences": 100}
        settings |= {"teacher_fraction": 0.5, "heldout_fraction": 0.2}
        return RunFile.model_validate(
            {
                "name": "tried",
                "out": str(tmp_path / out),
                "corpus": {name: value for name, value in (settings | corpus).items() if value is not None},
                "teacher": {"model": {}},
                "student": {"model": {}},
            }
        )

    return make
