"""Stands in for torchvision where no build for CPUs is to be had: every name is there, and nothing can be called.

vLLM imports the image processors of a model that sees, though only its text is scored.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from enum import Enum
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any, ClassVar

__version__ = "0.28.0"
__path__: list[str] = []

_MODES = ("NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")


class _Module(types.ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            return Enum(name, {mode: mode.lower().replace("_", "-") for mode in _MODES})
        return type(name, (_Unusable,), {})


class _Unusable:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no torchvision here")


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> Any:
        return ModuleSpec(name, self, is_package=True) if name.startswith(f"{__name__}.") else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.insert(0, _Finder())
