"""What the cache stage holds of the machine's memory: the targets of the shards that it is at.

One shard is with the teacher while others are encoded and written. Each is arrays whose sizes follow from the settings,
so that the most that is held is known before the teacher is started.
"""

from __future__ import annotations

from capgap.pipeline.stage.events import event
from capgap.schemas.errors import MachineError
from capgap.schemas.run_cache import CacheSettings

# A thread encodes about a million tokens a second. With two, three shards are in memory at most: one that the teacher
# is at, and two in the writing.
WRITING_THREADS = 2


def held_bytes(settings: CacheSettings, shard_targets: int) -> int:
    """The most that is held at once, of shards with that many targets."""
    num_samples, top_k = settings.num_ids("sampled"), settings.num_ids("topk")
    tail = 4 * (1 + len(settings.extra_temperatures)) if top_k else 0
    label, sequences = 4, 4 + 1 + 1
    return (4 * num_samples + 8 * top_k + tail + label + sequences) * shard_targets * (WRITING_THREADS + 1)


def require_room(settings: CacheSettings, shard_targets: int) -> None:
    """Say what will be held, and refuse what the machine has no room for.

    Raises:
        MachineError: it is more than is free.
    """
    # imported here: to plan a cache takes no torch
    from capgap.pipeline.train.fits import free_bytes

    needed, free = held_bytes(settings, shard_targets), free_bytes("cpu")
    text = f"cache: up to {needed / 1e9:.2f} GB of targets are held at once, in shards of {shard_targets:,} tokens"
    event("cache_memory", text, held_bytes=needed, shard_tokens=shard_targets)
    if needed > free:
        raise MachineError(
            "no room in the machine's memory for the targets of the shards at work",
            where="corpus.shard_sequences",
            found=f"shards of {shard_targets:,} tokens, {needed / 1e9:.1f} GB of targets at once",
            expected=f"at most the {free / 1e9:.1f} GB that are free",
            fix="lower corpus.shard_sequences, or cache.top_k or cache.num_samples",
        )
