"""Lines and rows on the students' nearness to the teacher that the final table has no column for."""

from __future__ import annotations

import math
from collections.abc import Iterable

from capgap.schemas.results import EvalResults, HeldoutCache, Interval, ModelResult, Quantity

_NAMES: dict[Quantity, str] = {
    "loss": "loss",
    "kl": "KL to the teacher",
    "cached_kl": "KL to the cache",
    "cached_teacher_ce": "cross-entropy with the cached samples",
    "cached_chunk_kl": "KL of chunks to the cache",
}

DIFFERENCE_HEADINGS = ("pair", "quantity", "difference, nats/token", "low", "high")


def nearness_lines(results: EvalResults) -> tuple[str, ...]:
    """Return the lines below the final table: nearness to the cache, and acceptance of drafts by the teacher."""
    missing: tuple[str, ...] = ()
    if results.teacher_missing is not None:
        missing = (f"note: the teacher was not measured ({results.teacher_missing}): no KL, top-1 and acceptance",)
    return (*missing, *_cached(results), *_drafts(results))


def difference_rows(results: EvalResults) -> tuple[tuple[str, ...], ...]:
    """Return the difference in nearness of every two arms, for each seed and as the mean over seeds.

    A positive difference means that the second arm is nearer to the teacher.
    """
    seeds = [
        (f"{one.first} - {one.second}, seed {one.seed}", _NAMES[one.quantity], *_numbers(one.difference, one.interval))
        for one in results.paired_nearness
    ]
    means = [
        (f"{one.first} - {one.second}, mean", _NAMES[one.quantity], *_numbers(one.difference, one.interval))
        for one in results.nearness_over_seeds
    ]
    return (*seeds, *means)


def _cached(results: EvalResults) -> Iterable[str]:
    cached = results.cached
    if cached is None:
        return
    found = [(_title(model), model.against_cache) for model in results.models if model.against_cache is not None]
    if cached.recording == "chunks":
        yield from _chunks(cached, [(title, near.chunk_kl) for title, near in found])
        return
    topk = cached.recording == "topk"
    what = "KL to its top-k tokens and their tail, a lower bound" if topk else "cross-entropy with its samples"
    values = ", ".join(f"{title} {near.kl if topk else near.teacher_ce:.4f}" for title, near in found)
    teacher = "" if cached.teacher_loss is None else f"; the teacher's loss there {cached.teacher_loss:.4f}"
    yield (
        f"on the cache's {cached.num_sequences:,} held-out sequences (recording {cached.recording}, temperature "
        f"{cached.temperature:g}), {what}, nats/token: {values}{teacher}"
    )


def _chunks(cached: HeldoutCache, found: list[tuple[str, float | None]]) -> Iterable[str]:
    values = ", ".join(f"{title} {value:.4f}" for title, value in found if value is not None)
    yield (
        f"the teacher has other tokens, so KL by token does not exist; on {cached.num_sequences:,} held-out sequences "
        f"of the aligned cache, binarised KL of chunks to the teacher, nats/token: {values}"
    )
    if cached.teacher_bits_per_byte is not None:
        yield (
            "losses of models with other tokens are compared in bits per byte: the teacher's on the kept chunks of "
            f"this text is {cached.teacher_bits_per_byte:.4f}"
        )


def _drafts(results: EvalResults) -> Iterable[str]:
    for model in results.models:
        if model.drafted is None:
            continue
        foretold = ""
        if model.against_teacher is not None:
            foretold = f" (predicted from held-out text: {100 * model.against_teacher.acceptance:.1f} %)"
        yield (
            f"drafts for the teacher in {model.drafted.engine}: {_title(model)} has "
            f"{100 * model.drafted.acceptance:.1f} % of first tokens accepted{foretold}, "
            f"{model.drafted.tokens_per_look:.2f} tokens for each pass of the teacher at "
            f"{model.drafted.num_speculative_tokens} drafted"
        )


def _title(model: ModelResult) -> str:
    return "teacher" if model.arm is None else f"{model.arm}, seed {model.seed}"


def _numbers(difference: float, interval: Interval) -> tuple[str, ...]:
    return tuple(
        f"{value:+.4f}" if math.isfinite(value) else "-" for value in (difference, interval.low, interval.high)
    )
