"""Checks that reused teachers and caches belong to the grid's own corpus, teachers, recording and length of text."""

from __future__ import annotations

from capgap.pipeline.law.expand import teacher_run
from capgap.pipeline.plan.work import reused_stage
from capgap.pipeline.workflow.state import states
from capgap.schemas.errors import MismatchError
from capgap.schemas.facts import CacheFacts
from capgap.schemas.law import kept_text
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.manifest import Manifest


def require_reused(grid: LawGrid, corpus: Manifest) -> None:
    """Refuse reused teachers and caches that do not fit the grid, before anything is trained.

    Args:
        grid: The grid.
        corpus: Manifest of the grid's corpus.

    Raises:
        MismatchError: One was made from another corpus, teacher or recording than the grid's, or holds less
            or more of the text.
        InputError: The named folder holds no such stage.
    """
    for name in grid.teachers:
        run = teacher_run(grid, name)
        found = {stage: reused_stage(run, stage) for stage in ("teacher", "cache") if stage in run.reuse}
        for stage, (location, manifest) in found.items():
            where = f"reuse.{stage}s.{name}: {location}"
            _require(where, "corpus", manifest.inputs["corpus"].identity, corpus.identity)
            if stage == "cache":
                expected = found["teacher"][1].identity if "teacher" in found else states(run)["teacher"].order.identity
                _require(where, "teacher", manifest.inputs["teacher"].identity, expected)
                _require_kept(where, CacheFacts.model_validate(manifest.facts), grid)
                _require_length(where, manifest, grid, corpus)


def _require(where: str, what: str, found: str, expected: str) -> None:
    if found != expected:
        raise MismatchError(
            f"made from another {what} than the grid's",
            where=where,
            found=f"{what} {found[:12]}",
            expected=expected[:12],
            fix=f"reuse that {what} too, or leave this out",
        )


def _require_length(where: str, cache: Manifest, grid: LawGrid, corpus: Manifest) -> None:
    """Refuse a cache that holds less or more of the text than the grid's own caches."""
    text = corpus.shard_sets["student"]
    expected = sum(shard.num_sequences for shard in text.first_shards(grid.cache.max_tokens)) * text.seq_len
    for recording in grid.cache.recordings:
        found = cache.shard_sets[recording].num_tokens
        if found != expected:
            raise MismatchError(
                "caches of different lengths in one grid",
                where=where,
                found=f"{found:,} tokens",
                expected=f"{expected:,}, as cache.max_tokens and the corpus give it",
                fix="set cache.max_tokens as for that cache, or leave it out: the order of a training's data depends "
                "on the length of its cache, and a short one ends a training early",
            )


def _require_kept(where: str, facts: CacheFacts, grid: LawGrid) -> None:
    settings = grid.cache
    for name in settings.recordings:
        profile = settings.stored_profile if name == "topk" else None
        expected = kept_text(name, settings.num_ids(name), profile, settings.temperature)
        kept = facts.recordings.get(name)
        found = (
            f"no recording {name}" if kept is None else kept_text(name, kept.num_ids, kept.profile, facts.temperature)
        )
        if found != expected:
            raise MismatchError(
                "caches of different recordings in one grid",
                where=where,
                found=found,
                expected=expected,
                fix="record all teachers alike: what a recording leaves out looks like an effect of the teacher",
            )
