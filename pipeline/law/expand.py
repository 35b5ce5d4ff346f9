"""Expands a grid into ordinary run files: what each run makes, its folder, and the stages of other runs that it reads.

    OUT/run.yaml                                the corpus
    OUT/teachers/TEACHER/run.yaml               a teacher and its cache, over that corpus
    OUT/students/STUDENT/TEACHER/seed-N/...     first weights, an arm for each budget and alpha, their measurement
    OUT/students/STUDENT/supervised/seed-N/...  the same without a teacher
    OUT/students/STUDENT/TEACHER/pruned/seed-N/...  the student cut out of that teacher, with it and without it

A student's first weights depend on its shape, the corpus and the seed; those of a pruned student come from its teacher.
The order of its data depends on the seed and the cached text, which is the same for all teachers. Runs of one seed are
therefore paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.store.files import write_atomically
from capgap.schemas.errors import SettingError
from capgap.schemas.law import Init
from capgap.schemas.law_grid import SUPERVISED, LawGrid
from capgap.schemas.run_file import RunFile

RUN_NAME = "run.yaml"


@dataclass(frozen=True)
class Arm:
    """One training of a cell: a token budget and a weight of the KL to the teacher."""

    budget: str
    alpha: float

    @property
    def name(self) -> str:
        """The arm's name in the run file."""
        return f"{self.budget}-{SUPERVISED}" if self.alpha == 0 else f"{self.budget}-alpha-{self.alpha:g}"


@dataclass(frozen=True)
class Cell:
    """All trainings of one student with one init, one teacher or none, and one seed.

    Attributes:
        student: Name of the student.
        teacher: Name of the teacher; None for the supervised arms of a common init. The supervised arms of a pruned
            student belong to the cell of the teacher that it was cut out of.
        seed: Seed of the first weights and the data order.
        reads: Name of the teacher whose cache holds the text. Supervised arms can read any cache, because they use no
            targets.
        arms: The trainings.
        run: The run file.
        init: Source of the first weights.
    """

    student: str
    teacher: str | None
    seed: int
    reads: str
    arms: tuple[Arm, ...]
    run: RunFile
    init: Init = "common"

    @property
    def name(self) -> str:
        """Path of the cell's folder below the grid's folder, which is also the cell's name."""
        return cell_name(self.student, self.teacher, self.seed, self.init)

    @property
    def init_source(self) -> str | None:
        """Name of the teacher that the student was cut out of; None with a common init."""
        return self.teacher if self.init == "pruned" else None

    def trained(self, arm: Arm) -> Instance:
        """Return the instance that trains the arm."""
        return Instance("train", arm.name, self.seed)


def cell_name(student: str, teacher: str | None, seed: int, init: Init = "common") -> str:
    """Return the path of a cell's folder below the grid's folder."""
    init_folder = "" if init == "common" else f"{init}/"
    return f"students/{student}/{teacher or SUPERVISED}/{init_folder}seed-{seed}"


def corpus_run(grid: LawGrid) -> RunFile:
    """Return the run whose corpus stage makes the corpus of the whole grid.

    Its teacher is one that is trained on the corpus, if the grid has one.
    """
    reuse = {"corpus": grid.reuse.corpus} if grid.reuse.corpus else {}
    learning = (name for name, teacher in grid.teachers.items() if teacher.optimization is not None)
    return _run_file(grid, grid.out, "corpus", next(learning, next(iter(grid.teachers))), reuse)


def corpus_folder(grid: LawGrid) -> str:
    """Return the folder of the grid's corpus."""
    return grid.reuse.corpus or str(Path(grid.out) / "corpus")


def teacher_run(grid: LawGrid, teacher: str) -> RunFile:
    """Return the run that makes the teacher and its cache."""
    reuse = {"corpus": corpus_folder(grid)}
    reuse |= {"teacher": grid.reuse.teachers[teacher]} if teacher in grid.reuse.teachers else {}
    reuse |= {"cache": grid.reuse.caches[teacher]} if teacher in grid.reuse.caches else {}
    return _run_file(grid, _teacher_folder(grid, teacher), f"teacher-{teacher}", teacher, reuse)


def teacher_folder(grid: LawGrid, teacher: str) -> str:
    """Return the folder of the stage that makes the teacher."""
    return grid.reuse.teachers.get(teacher) or str(Path(_teacher_folder(grid, teacher)) / "teacher")


def cache_folder(grid: LawGrid, teacher: str) -> str:
    """Return the folder or the URL of the teacher's cache."""
    return grid.reuse.caches.get(teacher) or str(Path(_teacher_folder(grid, teacher)) / "cache")


def cell(
    grid: LawGrid,
    student: str,
    teacher: str | None,
    seed: int,
    tokens: Mapping[str, int],
    reads: str | None = None,
    init: Init = "common",
) -> Cell:
    """Build one cell of the grid.

    Args:
        grid: The grid.
        student: Name of the student.
        teacher: Name of the teacher; None for the supervised arms.
        seed: One of the grid's seeds.
        tokens: Training targets of each budget for this student, by the budget's name.
        reads: Name of the teacher whose cache supervised arms read; by default the grid's first teacher.
        init: Source of the first weights; a pruned student needs a teacher.
    """
    source = teacher or reads or next(iter(grid.teachers))
    alone = (0.0,) if teacher is None or init == "pruned" else ()
    arms = tuple(
        Arm(name, alpha)
        for name, budget in grid.budgets.items()
        if budget.has(student)
        for alpha in (*alone, *((budget.alphas or grid.alphas) if teacher else ()))
    )
    reuse = {
        "corpus": corpus_folder(grid),
        "teacher": teacher_folder(grid, source),
        "cache": cache_folder(grid, source),
    }
    name = cell_name(student, teacher, seed, init)
    run = _run_file(grid, str(Path(grid.out) / name), name.replace("/", "-"), source, reuse, student, init)
    settings = {arm.name: {"alpha": arm.alpha, "max_tokens": tokens[arm.budget]} for arm in arms}
    own = run.model_copy(update={"seeds": (seed,), "arms": settings})
    return Cell(student, teacher, seed, source, arms, own, init)


def cells(grid: LawGrid, tokens: Mapping[str, Mapping[str, int]]) -> Iterator[Cell]:
    """Yield every cell; the supervised cell of a student and seed comes first.

    `tokens` holds the training targets by student and budget.
    """
    for student in grid.students:
        for seed in grid.seeds:
            for init in grid.inits:
                alone = (None,) if init == "common" else ()
                for teacher in (*alone, *grid.teachers):
                    yield cell(grid, student, teacher, seed, tokens[student], init=init)


def write_run_file(run: RunFile) -> Path:
    """Write the run file into the run's folder, so that people can start it by hand, and return its path."""
    folder = Path(run.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RUN_NAME, yaml.safe_dump(run.written(), sort_keys=False, width=120))
    return folder / RUN_NAME


def _teacher_folder(grid: LawGrid, teacher: str) -> str:
    return str(Path(grid.out) / "teachers" / teacher)


def _run_file(
    grid: LawGrid,
    out: str,
    name: str,
    teacher: str,
    reuse: Mapping[str, str],
    student: str | None = None,
    init: Init = "common",
) -> RunFile:
    trained = student or next(iter(grid.students))
    try:
        return RunFile.model_validate(
            {
                "name": f"{grid.name}-{name}",
                "out": out,
                "device": grid.device,
                "seeds": grid.seeds,
                "reuse": dict(reuse),
                "corpus": grid.corpus,
                "teacher": grid.teacher_settings(teacher),
                "cache": grid.cache,
                "student": grid.student_settings(trained, init),
                "train": grid.train_settings(trained),
                "eval": grid.eval,
            }
        )
    except ValidationError as error:
        raise SettingError(error.errors()[0]["msg"].removeprefix("Value error, "), where=grid.name) from None
