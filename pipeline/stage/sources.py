"""Files outside the run that a stage reads, beside those that its declaration finds itself."""

from __future__ import annotations

from pathlib import Path

# code that comes with a model decides what it computes, where it is trusted
_MODEL_SUFFIXES = {".py", ".safetensors", ".json", ".bin", ".model", ".txt", ".jinja"}


def model_files(path: str | None) -> list[Path]:
    """The files of a model or tokenizer in a folder, sorted; none for a Hugging Face id."""
    folder = Path(path) if path else None
    if folder is None or not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in _MODEL_SUFFIXES)
