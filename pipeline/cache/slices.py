"""Make the shards of one slice of a cache. Each shard is claimed before the teacher scores it."""

from __future__ import annotations

from capgap.pipeline.cache.cross_check import CheckedShardScorer
from capgap.pipeline.cache.held import WRITING_THREADS, require_room
from capgap.pipeline.cache.overlap import overlap
from capgap.pipeline.cache.shard_lines import shard_lines
from capgap.pipeline.cache.shards import CacheJob, ScoredShard
from capgap.pipeline.cache.stage import prepare as prepare
from capgap.pipeline.cache.vllm_start import leave_cores_unbound
from capgap.pipeline.stage.claims import Claims
from capgap.pipeline.stage.context import Slice


def make_slice(job: CacheJob, part: Slice) -> None:
    """Make the missing shards of the slice that no other process is making.

    The claims of a killed process are free again, so this slice makes its shards if they belong to the slice.

    Args:
        job: the cache's job.
        part: the slice.

    Raises:
        CapgapError: as `ShardScorer`.
    """
    leave_cores_unbound()
    claims, scorer = Claims(job.units, part), CheckedShardScorer(job)
    wanted = [index for index in range(job.units.total) if part.has(index)]
    seq_len = job.source.seq_len
    require_room(job.settings, max(shard.num_sequences for shard in job.source.shards) * seq_len, seq_len)

    def write(shard: ScoredShard) -> None:
        written = scorer.write(shard)
        claims.release(shard.index)
        lines.finished(shard.index, written)

    try:
        with shard_lines(job, f"cache: slice {part}", wanted, job.units.made(), job.device) as lines:
            for _ in overlap(claims.take_each(), scorer.score, write, WRITING_THREADS):
                pass
    finally:
        scorer.close()
        claims.close()
