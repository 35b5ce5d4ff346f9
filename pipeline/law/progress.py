"""Keeps the jobs of a grid and their results so far.

Everything is read from folders once, when a command begins. After that, only the cell or the teacher of a job is read
again, when the job has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from capgap.pipeline.law.expand import Cell, cell, cells, teacher_run
from capgap.pipeline.law.outcome import Outcome, outcome_of
from capgap.pipeline.law.reused import require_reused
from capgap.pipeline.law.rows import GridFacts, TeacherFacts, corpus_manifest, teacher_facts
from capgap.pipeline.law.sizes import sizes_of, tokens_by_student
from capgap.pipeline.law.table import write_table
from capgap.pipeline.law.worker import Job, cell_job, read_failures, teacher_job
from capgap.pipeline.stage.manifests import each_manifest_once, read_manifest
from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.facts import CorpusFacts
from capgap.schemas.law import LawRun
from capgap.schemas.law_grid import LawGrid

TABLE_NAME = "runs.jsonl"


class GridProgress:
    """The jobs of a grid whose corpus is made, and the table of its runs.

    Raises:
        SettingError, MismatchError, InputError: The grid, or something it reuses, cannot be used.
    """

    def __init__(self, grid: LawGrid) -> None:
        self._grid = grid
        self._runs = {name: teacher_run(grid, name) for name in grid.teachers}
        with each_manifest_once():
            corpus = corpus_manifest(grid)
            sizes = sizes_of(grid, CorpusFacts.model_validate(corpus.facts).tokenizer.vocab_size)
            self._facts = GridFacts(grid, corpus, sizes, tokens_by_student(grid, sizes))
            _require_text(grid, self._facts.tokens, corpus.shard_sets["student"].num_tokens)
            require_reused(grid, corpus)
            self._teachers: dict[str, TeacherFacts] = {name: teacher_facts(grid, name) for name in grid.teachers}
            every = [self._as_begun(one) for one in cells(grid, self._facts.tokens)]
            self._cells: dict[str, Cell] = {one.name: one for one in every}
            self._outcomes: dict[str, Outcome] = {one.name: outcome_of(one, self._why_not(one.reads)) for one in every}

    @property
    def table_path(self) -> Path:
        """Path of the table."""
        return Path(self._grid.out) / TABLE_NAME

    def teacher_jobs(self) -> list[Job]:
        """Return the jobs of teachers that are not current or whose cache is not, the largest teacher first."""
        sizes = self._facts.sizes.teachers
        names = sorted(self._teachers, key=lambda name: -sizes[name].num_parameters)
        return [teacher_job(_job_name(one), self._runs[one]) for one in names if not self._teachers[one].is_made]

    def cell_jobs(self) -> list[Job]:
        """Return the jobs of unfinished cells, the longest first, seed by seed, because only complete seeds count."""
        pending = [one for one in self._cells.values() if not self._outcomes[one.name].finished]
        pending.sort(key=lambda one: (self._grid.seeds.index(one.seed), -self._cost(one)))
        return [cell_job(one, _job_name(one.reads)) for one in pending]

    def ended_well(self, job: Job) -> None:
        """Read the results of a job that has succeeded."""
        self._look_again(job, "")

    def failed(self, job: Job, code: int) -> None:
        """Read the results of a job that has failed with an exit code: what it made before the failure counts."""
        self._look_again(job, "" if read_failures(job.run) else _ended(code))

    def without(self, job: Job, failed: Mapping[str, int]) -> Job | None:
        """Return the job to do in the place of a cell's job whose teacher failed; None where the cell cannot be made.

        A supervised cell can read the text of another teacher's cache instead.

        Args:
            job: Job of the cell.
            failed: Exit codes of the failed jobs, by name.
        """
        one = self._cells[job.name]
        left = [name for name in self._grid.teachers if _job_name(name) not in failed]
        if one.teacher is None and left:
            other = self._supervised(one, left[0])
            self._cells[job.name] = other
            return cell_job(other, _job_name(left[0]))
        why = self._why_not(one.reads) or f"{_job_name(one.reads)}: {_ended(failed[_job_name(one.reads)])}"
        self._look_again(job, why)
        return None

    def rows(self) -> list[LawRun]:
        """Return the rows of the table."""
        return self._facts.rows(self._cells.values(), self._outcomes, self._teachers)

    def write(self) -> None:
        """Write the table."""
        write_table(self.table_path, self.rows())

    def _as_begun(self, one: Cell) -> Cell:
        """Return the cell; a supervised one reads the cache of its earlier trainings, so that they stay current."""
        if one.teacher is not None:
            return one
        by_cache = {facts.cache_identity: name for name, facts in self._teachers.items()}
        for arm in one.arms:
            trained = read_manifest(Path(one.run.out) / one.trained(arm).name)
            if trained is not None and (teacher := by_cache.get(trained.inputs["cache"].identity)):
                return self._supervised(one, teacher)
        return one

    def _supervised(self, one: Cell, reads: str) -> Cell:
        return cell(self._grid, one.student, None, one.seed, self._facts.tokens[one.student], reads)

    def _look_again(self, job: Job, why: str) -> None:
        with each_manifest_once():
            if job.name in self._cells:
                self._outcomes[job.name] = outcome_of(self._cells[job.name], why)
            else:
                name = next(one for one in self._grid.teachers if _job_name(one) == job.name)
                self._teachers[name] = teacher_facts(self._grid, name)

    def _why_not(self, teacher: str) -> str:
        """Return why a teacher or its cache failed in the last attempt; empty where no failure is known."""
        failures = read_failures(self._runs[teacher])
        return "; ".join(f"{_job_name(teacher)}, {name}: {why}" for name, why in failures.items())

    def _cost(self, one: Cell) -> float:
        size = self._facts.sizes.students[one.student].num_parameters
        return size * sum(self._facts.tokens[one.student][arm.budget] for arm in one.arms)


def _job_name(teacher: str) -> str:
    return f"teachers/{teacher}"


def _ended(code: int) -> str:
    return f"its process was killed by signal {-code}" if code < 0 else f"its process ended with exit code {code}"


def _require_text(grid: LawGrid, tokens: Mapping[str, Mapping[str, int]], num_tokens: int) -> None:
    """Refuse budgets that are smaller than a step or larger than the text, where a run would end early silently."""
    for student, budgets in tokens.items():
        settings = grid.train_settings(student)
        cached = min(num_tokens, grid.cache.max_tokens or num_tokens)
        for budget, asked in budgets.items():
            if asked > cached * settings.num_epochs:
                raise SettingError(
                    "the budget is larger than the cached text",
                    where=f"budgets.{budget}, {student}",
                    found=f"{asked:,} tokens",
                    expected=f"at most {cached * settings.num_epochs:,}",
                    fix="give more text, raise cache.max_tokens, or train.num_epochs if tokens may be seen again",
                )
            if 0 < asked < settings.batch_sequences * grid.corpus.seq_len:
                raise InputError(
                    "the budget is smaller than a step",
                    where=f"budgets.{budget}, {student}",
                    found=f"{asked:,} tokens",
                    expected=f"at least {settings.batch_sequences * grid.corpus.seq_len:,}",
                )
