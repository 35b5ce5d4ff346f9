"""The stages, one folder each, and what they share.

    corpus -> teacher -> cache -> student -> train -> eval -> report        (workflow: order, state, lease, manifests)
        \\________ store: shards of sequences and targets ________/

A stage is `run(StageContext) -> StageResult` in `pipeline/<stage>/stage.py`. It reads the folders of its inputs and
writes its own; `workflow` hashes the files and writes the manifest.

In a notebook or a training loop of one's own: `from capgap.pipeline import DistillationLoss, open_cache`.
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
