"""Builds the rows of a grid's table from the outcomes of its cells and the facts of its teachers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap.pipeline.law.expand import Arm, Cell, cache_folder, corpus_folder, teacher_folder, teacher_run
from capgap.pipeline.law.outcome import Outcome
from capgap.pipeline.law.sizes import Sizes
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import is_url
from capgap.pipeline.teacher.trained import training_tokens
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import InputError
from capgap.schemas.facts import CacheFacts, CorpusFacts
from capgap.schemas.law import LawCache, LawModel, LawRun, LawTeacher, Setting
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.manifest import Manifest
from capgap.schemas.results import ModelResult

# Settings that are an axis of the grid, or that have another place in the row.
_AXES = ("alpha", "max_tokens", "precision")

_OF_A_TEACHER = ("teacher", "cache")


@dataclass(frozen=True)
class TeacherFacts:
    """The present facts of a teacher and its cache.

    Attributes:
        train_tokens: Number of tokens that the teacher was trained on; None where it is not known.
        cache: Manifest of the teacher's cache; None where the cache is not made.
        cache_identity: Identity of the cache, made or not.
        is_made: Whether teacher and cache are current or reused.
    """

    train_tokens: int | None
    cache: Manifest | None
    cache_identity: str
    is_made: bool


def teacher_facts(grid: LawGrid, name: str) -> TeacherFacts:
    """Read the facts of a teacher and its cache from their folders.

    Raises:
        InputError: Something that the teacher's run reuses is missing.
    """
    run = teacher_run(grid, name)
    known = states(run)
    teacher, cache = (read_manifest(_location(folder(grid, name))) for folder in (teacher_folder, cache_folder))
    return TeacherFacts(
        train_tokens=None if teacher is None else training_tokens(teacher),
        cache=cache,
        cache_identity=known["cache"].order.identity if cache is None else cache.identity,
        is_made=all(stage in run.reuse or known[stage].state is State.CURRENT for stage in _OF_A_TEACHER),
    )


def corpus_manifest(grid: LawGrid) -> Manifest:
    """Read the manifest of the grid's corpus.

    Raises:
        InputError: The corpus is not made.
    """
    folder = Path(corpus_folder(grid))
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError("the corpus is not made", where=folder, fix="start it with `capgap law run GRID.yaml`")
    return manifest


@dataclass(frozen=True)
class GridFacts:
    """The facts of a grid that all rows of its table need.

    Attributes:
        grid: The grid.
        corpus: Manifest of the corpus.
        sizes: Sizes of the models.
        tokens: Number of training targets, by student and budget.
    """

    grid: LawGrid
    corpus: Manifest
    sizes: Sizes
    tokens: Mapping[str, Mapping[str, int]]

    def rows(
        self, cells: Iterable[Cell], outcomes: Mapping[str, Outcome], teachers: Mapping[str, TeacherFacts]
    ) -> list[LawRun]:
        """Return the rows of the table.

        Args:
            cells: All cells of the grid.
            outcomes: Outcome of each cell, by the cell's name.
            teachers: Facts of each teacher, by the teacher's name.
        """
        every = list(cells)
        losses: dict[str, float] = {}
        for cell in every:
            measured = outcomes[cell.name].teacher_loss
            if measured is not None:
                # each cell measures its teacher again, with the same result but for rounding in other batches on a GPU
                losses.setdefault(cell.reads, measured)
        common = {student: self._common(student) for student in self.grid.students}
        return [
            self._row(cell, arm, outcomes[cell.name], teachers[cell.reads], losses.get(cell.reads), common)
            for cell in every
            for arm in cell.arms
        ]

    def _row(
        self,
        cell: Cell,
        arm: Arm,
        outcome: Outcome,
        teacher: TeacherFacts,
        teacher_loss: float | None,
        common: Mapping[str, dict[str, Setting]],
    ) -> LawRun:
        result, manifest = outcome.results.get(arm.name), outcome.manifests.get(arm.name)
        taught = arm.alpha > 0
        size = self.sizes.teachers[cell.reads]
        return LawRun(
            student=_as_made(self.sizes.student(cell), result),
            teacher=LawTeacher(**size.model_dump(), loss=teacher_loss, train_tokens=teacher.train_tokens)
            if taught
            else None,
            cache=self._cache(cell, teacher) if taught else None,
            budget=arm.budget,
            tokens=self._tokens(cell, arm, manifest),
            alpha=arm.alpha,
            init=cell.init,
            init_source=cell.init_source,
            arm=arm.name,
            seed=cell.seed,
            loss=result.loss if result else None,
            missing=None if result else outcome.missing[arm.name],
            metrics=_metrics(result, taught=taught) if result else {},
            wall_s=manifest.wall_s if manifest else None,
            common=common[cell.student],
            per_student=_per_student(cell, arm),
        )

    def _tokens(self, cell: Cell, arm: Arm, manifest: Manifest | None) -> int:
        """Return the number of training targets; for an untrained run, the budget rounded down to whole steps."""
        if manifest is not None:
            return int(manifest.totals["num_tokens"])  # type: ignore[arg-type]
        step = self.grid.train_settings(cell.student).batch_sequences * self.grid.corpus.seq_len
        tokens = self.tokens[cell.student][arm.budget]
        return max(1, tokens // step) * step if tokens else 0

    def _cache(self, cell: Cell, teacher: TeacherFacts) -> LawCache:
        """Describe the cache, from its manifest where it is made, else from the settings."""
        settings, student = self.grid.cache, self.grid.train_settings(cell.student)
        recording = student.recording or settings.recordings[0]
        if teacher.cache is not None:
            facts = CacheFacts.model_validate(teacher.cache.facts)
            kept, temperature = facts.recordings[recording], facts.temperature
            num_ids, profile = kept.num_ids, kept.profile
            num_tokens = teacher.cache.shard_sets[recording].num_tokens
        else:
            num_ids, temperature = settings.num_ids(recording), settings.temperature
            profile = settings.stored_profile if recording == "topk" else None
            num_tokens = settings.max_tokens or self.corpus.shard_sets["student"].num_tokens
        return LawCache(
            identity=teacher.cache_identity,
            recording=recording,
            num_ids=num_ids,
            profile=profile,
            temperature=temperature if student.temperature is None else student.temperature,
            num_tokens=num_tokens,
        )

    def _common(self, student: str) -> dict[str, Setting]:
        """Return the settings and facts that must be equal in all rows."""
        facts = CorpusFacts.model_validate(self.corpus.facts)
        heldout = self.corpus.shard_sets["heldout"]
        settings = self.grid.train_settings(student)
        return {
            "tokenizer": facts.tokenizer.fingerprint,
            "corpus": self.corpus.identity,
            "heldout": heldout.shards[0].file.sha256,
            "heldout_sequences": min(self.grid.eval.num_sequences, heldout.num_sequences),
            "context": facts.context,
            "seq_len": heldout.seq_len,
            "precision": settings.precision,
            "divergence": settings.divergence,
        }


def _location(folder: str) -> Path | str:
    return folder if is_url(folder) else Path(folder)


def _per_student(cell: Cell, arm: Arm) -> dict[str, Setting]:
    """Return the training settings that must be equal in all rows of one student and budget."""
    values = cell.run.train_settings(arm.name).decisive()
    return {name: value for name, value in values.items() if name not in _AXES and not _is_group(value)}


def _is_group(value: Any) -> bool:
    return isinstance(value, dict | list | tuple)


def _as_made(counted: LawModel, result: ModelResult | None) -> LawModel:
    """Return the size of a model as it was measured, or as it was counted before where there is no result.

    A measured size that differs from the other rows is refused when the table is read.
    """
    if result is None:
        return counted
    made = ("num_parameters", "num_non_embedding_parameters")
    return counted.model_copy(update={name: getattr(result, name) for name in made})


def _metrics(result: ModelResult, *, taught: bool) -> dict[str, float]:
    """Return every number that the eval stage measured; comparisons with the teacher only for students it taught."""
    values = result.model_dump(mode="json")
    nearness = values.pop("against_teacher") or {}
    for name in ("loss", "seed", "num_parameters", "num_non_embedding_parameters"):
        del values[name]
    return _numbers(values) | (_numbers(nearness) if taught else {})


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
