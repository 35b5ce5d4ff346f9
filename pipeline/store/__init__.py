"""The store is the only home of the shard format: how shards are laid out, written, read, checked and ordered.

    Sequences + Targets --codec--> Arrow IPC stream --zstd frame with checksum--> member --tar--> shard
         ^                                                                                          |
         |        ShardEntry (offsets, crc32, sha256) in manifest.json  <---------------------------+
         +--- reader (random access through the offsets) <--- loader <--- order (pure function of seed and epoch)

    reader --members distributed over ranks and workers--> samples, in any WebDataset pipeline

A shard is a plain WebDataset tar, so other programs can read it. Order, resume and integrity do not rely on WebDataset:
they come from the manifest. A shard counts as existing only if the manifest lists it or, while its stage is still
running, if it has a sidecar.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capgap.pipeline.store.alignment import check_alignment
    from capgap.pipeline.store.batch import Batch
    from capgap.pipeline.store.codec import Codec, codec_for
    from capgap.pipeline.store.disk_cache import DiskCache
    from capgap.pipeline.store.fetched import folder_with
    from capgap.pipeline.store.loader import SequenceLoader, target_temperature_of
    from capgap.pipeline.store.loader_settings import LoaderSettings
    from capgap.pipeline.store.memory import keep_freed_memory
    from capgap.pipeline.store.mixed import MixedLoader
    from capgap.pipeline.store.order import Order
    from capgap.pipeline.store.places import is_url, place_of
    from capgap.pipeline.store.ranking import Ranking, rank_ids
    from capgap.pipeline.store.reader import ShardReader, read_blocks
    from capgap.pipeline.store.remote import Remote
    from capgap.pipeline.store.writer import Block, ShardWriter, split_blocks

_HOMES = {
    "Batch": "batch",
    "Block": "writer",
    "Codec": "codec",
    "DiskCache": "disk_cache",
    "LoaderSettings": "loader_settings",
    "MixedLoader": "mixed",
    "Order": "order",
    "Ranking": "ranking",
    "Remote": "remote",
    "SequenceLoader": "loader",
    "ShardReader": "reader",
    "ShardWriter": "writer",
    "check_alignment": "alignment",
    "codec_for": "codec",
    "folder_with": "fetched",
    "is_url": "places",
    "keep_freed_memory": "memory",
    "place_of": "places",
    "rank_ids": "ranking",
    "read_blocks": "reader",
    "split_blocks": "writer",
    "target_temperature_of": "loader",
}

__all__ = [
    "Batch",
    "Block",
    "Codec",
    "DiskCache",
    "LoaderSettings",
    "MixedLoader",
    "Order",
    "Ranking",
    "Remote",
    "SequenceLoader",
    "ShardReader",
    "ShardWriter",
    "check_alignment",
    "codec_for",
    "folder_with",
    "is_url",
    "keep_freed_memory",
    "place_of",
    "rank_ids",
    "read_blocks",
    "split_blocks",
    "target_temperature_of",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that a command that only reads manifests does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
