"""A run over a few small texts, its corpus made by the installed command, for tests of what the command says."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

CAPGAP = Path(sys.executable).with_name("capgap")
TIMEOUT_S = 1800

Capgap = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def capgap() -> Capgap:
    """Run the installed command to its end."""

    def run(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(CAPGAP), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**os.environ, **(env or {})},
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, capgap: Capgap) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Folder with `run.yaml` and the finished corpus below `out`, and what the command said in JSON."""
    folder = tmp_path_factory.mktemp("small")
    chance = random.Random(3)
    words = ["".join(chance.choices("aeioubcdfglmnprst", k=chance.randrange(2, 9))) for _ in range(300)]
    for number in range(60):
        text = "\n".join(" ".join(chance.choices(words, k=12)) for _ in range(chance.randrange(5, 25)))
        (folder / f"{number:02d}.txt").write_text(text + "\n")
    corpus = {"sources": [f"{folder}/*.txt"], "vocab_size": 400, "seq_len": 32, "shard_sequences": 100}
    shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}
    settings = {
        "name": "small",
        "out": str(folder / "out"),
        "device": "cpu",
        "corpus": {**corpus, "teacher_fraction": 0.5, "heldout_fraction": 0.2},
        "teacher": {"model": shape, "training": {"max_tokens": 2000}},
        "cache": {"engine": "transformers"},
        "student": {"model": shape},
        "train": {},
        "eval": {},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    done = capgap("corpus", folder / "run.yaml", "--log-format", "json")
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def run_file(made: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> Path:
    """A copy of the run file, over a copy of the finished corpus, to be spoilt."""
    folder, _ = made
    shutil.copytree(folder / "out", tmp_path / "out")
    settings = yaml.safe_load((folder / "run.yaml").read_text()) | {"out": str(tmp_path / "out")}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
