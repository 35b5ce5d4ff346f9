"""Digests of what a stage is to make (identity, before the work) and of what it made (content, after it)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from capgap.schemas.manifest import FileEntry, Manifest, SourceEntry

# Part of every identity: raise it when a stage's meaning changes under unchanged settings.
_GENERATION = 1

# Files that differ between two runs of one training with equal weights: one holds times, the other names folders and
# texts by their paths.
_NOT_COMPUTED = {"metrics.csv", "model/README.md"}


def identity_of(stage: str, settings: Mapping[str, Any], input_identities: Mapping[str, str]) -> str:
    """Return the digest of the stage, its decisive settings and the identities of all its inputs."""
    return digest_of(
        {"generation": _GENERATION, "stage": stage, "settings": dict(settings), "inputs": dict(input_identities)}
    )


def content_of(files: Iterable[FileEntry], sources: Iterable[SourceEntry] = ()) -> str:
    """Return the digest of what a stage computed and read, whatever its folder and the time at which it was made."""
    made = [[file.path, file.sha256] for file in files if file.path not in _NOT_COMPUTED]
    return digest_of(sorted(made) + sorted([PurePath(source.path).name, source.sha256] for source in sources))


def seal_of(manifest: Manifest) -> str:
    """Return the digest of a manifest without its seal."""
    return digest_of(manifest.model_dump(mode="json", exclude={"seal"}))


def digest_of(value: object) -> str:
    """Return the sha256 of a JSON value in its canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Return dotted name, old and new value of the first setting in which two JSON values differ; None if none does."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(name), new.get(name), f"{path}.{name}" if path else name)
            if found:
                return found
        return None
    return None if old == new else (path, old, new)
