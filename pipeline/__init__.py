"""The stages, one folder each, and what they stand on.

    store/ <- stage/ <- models/ <- corpus/ teacher/ cache/ student/ train/ tune/ eval/ ...  <- stages.py: the list
                                                      <- workflow/ <- pages/ plan/ report/ law/

A stage declares itself in `declaration.py`, and does its work in `stage.py`: `run(StageContext) -> StageResult`. It
reads the folders of its inputs and writes its own; `workflow` hashes the files and writes the manifest.

In a notebook or a training loop of your own: `from capgap import DistillationLoss, open_cache`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capgap.pipeline.api import Cache, DistillationLoss, open_cache

__all__ = ["Cache", "DistillationLoss", "open_cache"]


def __getattr__(name: str) -> Any:
    """The names above, imported when they are asked for: the command line does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from capgap.pipeline import api

    return getattr(api, name)
