"""A folder of texts, and run files that make a corpus of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_folders import finish_folder

from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

NUM_TEXTS = 60

BASE: dict[str, Any] = {
    "name": "tried",
    "seeds": [0, 1],
    "corpus": {},
    "cache": {},
    "train": {},
    "eval": {},
    "teacher": {"model": {"hidden_size": 64, "num_heads": 4}, "training": {"learning_rate": 1e-3}},
    "student": {"model": {"hidden_size": 32, "num_heads": 4}},
    "arms": {"distilled": {}, "cross_entropy": {"alpha": 0}},
}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFile]:
    """A run file with some settings changed, each by its dotted name."""

    def make(settings: dict[str, Any] | None = None) -> RunFile:
        values = copy.deepcopy(BASE) | {"out": str(tmp_path / "out")}
        for path, value in (settings or {}).items():
            *parents, name = path.split(".")
            place = values
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = copy.deepcopy(value)
        return RunFile.model_validate(values)

    return make


@pytest.fixture
def make_finished() -> Callable[..., Manifest]:
    """Finish an instance's folder with one file of the given text, as `carry_out` would."""
    return finish_folder


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


@pytest.fixture
def without_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor as oneDNN sees one without instructions for products in 16 bits."""
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False)
