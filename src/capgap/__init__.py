"""Distil a large language model into a small one without ever holding both on one device.

A teacher scores a corpus once, and its distributions are kept as shards on disk; any number of students train from
them. The command line is `capgap`; in a notebook or in a training loop of your own:

    import capgap

    capgap.run("demo", out="runs/mine")                 # make every stage of a run file, here a shipped one
    cache = capgap.open_cache("runs/mine/cache")        # open a finished cache by folder or URL
    batches = cache.batches(8)                          # its sequences with the teacher's targets, as torch tensors
    samples = cache.webdataset()                        # the same as a pipeline of webdataset
    loss = capgap.DistillationLoss(model, cache)        # KL to the teacher, mixed with cross-entropy

`help(capgap.open_cache)` and the documentation say more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capgap.jobs.api import RunResult, run
    from capgap.pipeline.api import Cache, DistillationLoss, open_cache
    from capgap.pipeline.store.samples import collate_samples

    __version__: str

__all__ = ["Cache", "DistillationLoss", "RunResult", "__version__", "collate_samples", "open_cache", "run"]

_HOMES = {
    "Cache": "capgap.pipeline.api",
    "DistillationLoss": "capgap.pipeline.api",
    "RunResult": "capgap.jobs.api",
    "collate_samples": "capgap.pipeline.store.samples",
    "open_cache": "capgap.pipeline.api",
    "run": "capgap.jobs.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import capgap` does not import torch."""
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("capgap")
    except PackageNotFoundError:  # a checkout on the path that was never installed
        return "0+unknown"
