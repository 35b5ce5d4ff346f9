"""Counts the parameters of a grid's models, whether they are made or not, and the training tokens of each student."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from capgap.pipeline.law.expand import Cell, corpus_folder, corpus_run
from capgap.pipeline.law.pruned import pruned_sizes
from capgap.pipeline.plan.sizes import model_size
from capgap.pipeline.plan.tokens import vocab_size_of
from capgap.pipeline.stage.manifests import read_manifest
from capgap.schemas.errors import InputError
from capgap.schemas.law import LawModel
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.run_model import StudentSettings, TeacherSettings


@dataclass(frozen=True)
class Sizes:
    """Sizes of the grid's models, which all rows of the table share.

    Attributes:
        students: Students with a common init, by name.
        teachers: Teachers, by name.
        pruned: Students that are cut out of their teachers, by their name in the grid; empty where the grid has none.
    """

    students: dict[str, LawModel]
    teachers: dict[str, LawModel]
    pruned: dict[str, LawModel] = field(default_factory=dict)

    def student(self, cell: Cell) -> LawModel:
        """Return the size of the student that a cell trains."""
        return (self.pruned if cell.init == "pruned" else self.students)[cell.student]


def sizes_of(grid: LawGrid, vocab_size: int) -> Sizes:
    """Count the parameters of all models from their shapes or configurations.

    Raises:
        InputError: A given model cannot be read.
        SettingError: A teacher cannot give the shape of a pruned student, or teachers give one shape different sizes.
    """
    teachers = {name: _size(name, grid.teacher_settings(name), vocab_size, "teachers") for name in grid.teachers}
    students = {name: _size(name, settings, vocab_size, "students") for name, settings in grid.students.items()}
    return Sizes(students, teachers, pruned_sizes(grid, students, vocab_size) if "pruned" in grid.inits else {})


def vocab_size_of_grid(grid: LawGrid) -> int:
    """Return the vocabulary size of the grid's corpus, made or not; 0 where its tokenizer cannot be read."""
    return round(vocab_size_of(corpus_run(grid), read_manifest(Path(corpus_folder(grid)))) or 0)


def tokens_by_student(grid: LawGrid, sizes: Sizes) -> dict[str, dict[str, int]]:
    """Return the number of training targets, by student and budget."""
    return {
        student: {name: budget.tokens_of(size.num_parameters) for name, budget in grid.budgets.items()}
        for student, size in sizes.students.items()
    }


def _size(name: str, given: TeacherSettings | StudentSettings, vocab_size: int, setting: str) -> LawModel:
    size = model_size(None, given.path, given.model, vocab_size)
    if size.total is None or size.outside_embedding is None:
        raise InputError("the model cannot be counted", where=f"{setting}.{name}", found=size.where)
    return LawModel(
        name=name, num_parameters=round(size.total), num_non_embedding_parameters=round(size.outside_embedding)
    )
