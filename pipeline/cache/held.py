"""What the cache stage holds of the machine's memory: the targets of the shards that it is at, and a server's answers.

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


# A logprob in a server's answer: 84 bytes of JSON, and 385 once it is read, of ids and texts as long as they come.
_ANSWER_BYTES = 500


def held_bytes(settings: CacheSettings, shard_targets: int, seq_len: int) -> int:
    """The most that is held at once, of shards with that many targets in sequences of that many."""
    num_samples, top_k = settings.num_ids("sampled"), settings.num_ids("topk")
    tail = 4 * (1 + len(settings.extra_temperatures)) if top_k else 0
    label, sequences = 4, 4 + 1 + 1
    shards = (4 * num_samples + 8 * top_k + tail + label + sequences) * shard_targets * (WRITING_THREADS + 1)
    if settings.engine != "server":
        return shards
    return shards + settings.server.num_parallel * seq_len * (top_k + 1) * _ANSWER_BYTES


def require_room(settings: CacheSettings, shard_targets: int, seq_len: int) -> None:
    """Say what will be held, and refuse what the machine has no room for.

    Raises:
        MachineError: it is more than is free.
    """
    # imported here: to plan a cache takes no torch
    from capgap.pipeline.train.fits import free_bytes

    needed, free = held_bytes(settings, shard_targets, seq_len), free_bytes("cpu")
    what = "targets and a server's answers" if settings.engine == "server" else "targets"
    text = f"cache: up to {needed / 1e9:.2f} GB of {what} are held at once, in shards of {shard_targets:,} tokens"
    event("cache_memory", text, held_bytes=needed, shard_tokens=shard_targets)
    if needed > free:
        raise MachineError(
            "no room in the machine's memory for the targets of the shards at work",
            where="corpus.shard_sequences",
            found=f"shards of {shard_targets:,} tokens, {needed / 1e9:.1f} GB of targets at once",
            expected=f"at most the {free / 1e9:.1f} GB that are free",
            fix="lower corpus.shard_sequences, or cache.top_k, cache.num_samples or cache.server.num_parallel",
        )
