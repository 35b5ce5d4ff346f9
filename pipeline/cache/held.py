"""The memory that the cache stage holds on the machine: the targets of the shards in work, and a server's answers.

The teacher scores one shard while others are encoded and written. The sizes of their arrays follow from the settings,
so the peak is known before the teacher starts.
"""

from __future__ import annotations

from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.ray_cluster import joins_cluster
from capgap.schemas.errors import MachineError
from capgap.schemas.run_cache import CacheSettings

# A thread encodes about a million tokens per second. With two threads at most three shards are in memory: the one that
# the teacher scores, and two that are being written.
WRITING_THREADS = 2

# A replica scores one shard while another is encoded and written.
SHARDS_PER_REPLICA = 2

# Bytes per logprob of a server's answer: 84 as JSON and 385 after parsing, measured with ids and texts of usual length.
_ANSWER_BYTES = 500


def held_shards(settings: CacheSettings, num_missing: int) -> int:
    """Return how many shards are in this machine's memory at once while `num_missing` shards are made.

    Replicas that Ray starts here are all on this machine. On a cluster only one of them is counted, because the nodes
    on which Ray will start them are not known.
    """
    if settings.replicas == 1:
        return WRITING_THREADS + 1
    return SHARDS_PER_REPLICA * (1 if joins_cluster() else min(settings.replicas, num_missing))


def held_bytes(settings: CacheSettings, shard_targets: int, seq_len: int, num_shards: int = WRITING_THREADS + 1) -> int:
    """Return the peak memory, in bytes, of the targets (and a server's answers) that the cache stage holds at once.

    Args:
        settings: settings of the cache.
        shard_targets: number of targets of the largest shard.
        seq_len: number of targets of a sequence.
        num_shards: number of shards that are held at once, by default those of one engine.
    """
    num_samples, top_k = settings.num_ids("sampled"), settings.num_ids("topk")
    tail = 4 * (1 + len(settings.extra_temperatures)) if top_k else 0
    label, sequences = 4, 4 + 1 + 1
    shards = (4 * num_samples + 8 * top_k + tail + label + sequences) * shard_targets * num_shards
    if settings.engine != "server":
        return shards
    return shards + settings.server.num_parallel * seq_len * (top_k + 1) * _ANSWER_BYTES


def require_room(
    settings: CacheSettings, shard_targets: int, seq_len: int, num_shards: int = WRITING_THREADS + 1
) -> None:
    """Log the peak memory of the targets, and refuse shards that the machine has no room for.

    Args:
        settings: settings of the cache.
        shard_targets: number of targets of the largest shard.
        seq_len: number of targets of a sequence.
        num_shards: number of shards that are held at once, by default those of one engine.

    Raises:
        MachineError: the peak is more than the machine's free memory.
    """
    # imported here because it brings torch, which planning a cache does not need
    from capgap.pipeline.train.fits import free_bytes

    needed, free = held_bytes(settings, shard_targets, seq_len, num_shards), free_bytes("cpu")
    what = "targets and a server's answers" if settings.engine == "server" else "targets"
    text = f"cache: up to {needed / 1e9:.2f} GB of {what} are held at once, in shards of {shard_targets:,} tokens"
    event("cache_memory", text, held_bytes=needed, shard_tokens=shard_targets)
    if needed > free:
        raise MachineError(
            "no room in the machine's memory for the targets of the shards at work",
            where="corpus.shard_sequences",
            found=f"{num_shards} shards of {shard_targets:,} tokens at once, {needed / 1e9:.1f} GB of targets",
            expected=f"at most the {free / 1e9:.1f} GB that are free",
            fix="lower corpus.shard_sequences, or cache.top_k, cache.num_samples, cache.replicas or "
            "cache.server.num_parallel",
        )
