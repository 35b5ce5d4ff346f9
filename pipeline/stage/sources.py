"""Files outside the run that a stage reads, beside those that its declaration finds itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

_INDEX_NAME = "model.safetensors.index.json"
# these files decide what a model computes, among them the code that comes with it where that is trusted
_MODEL_SUFFIXES = {".py", ".safetensors", ".json", ".bin", ".model", ".txt", ".jinja"}


def model_files(path: str | None) -> list[Path]:
    """Return the files of a model or tokenizer in a folder, sorted; none for a Hugging Face id."""
    folder = Path(path) if path else None
    if folder is None or not folder.is_dir():
        return []
    beside = {file for file in folder.iterdir() if file.is_file() and file.suffix in _MODEL_SUFFIXES}
    return sorted(beside | set(_weights_below(folder)))


def place_below(path: str, paths: Iterable[str]) -> PurePath:
    """Return where a file of a model lies in the model's folder, the deepest that holds all of its files."""
    folders = [PurePath(one).parent.parts for one in paths]
    shared = min(len(parts) for parts in folders)
    while len({parts[:shared] for parts in folders}) > 1:
        shared -= 1
    return PurePath(*PurePath(path).parts[shared:])


def _weights_below(folder: Path) -> Iterator[Path]:
    """Yield the weight files in folders below the model's folder, which its index may name."""
    try:
        names = set(json.loads((folder / _INDEX_NAME).read_bytes())["weight_map"].values())
        files = [folder / name for name in names if ".." not in PurePath(name).parts]
        yield from (file for file in files if file.parent != folder and file.is_relative_to(folder) and file.is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # the code that loads the model reports what is wrong with its index
