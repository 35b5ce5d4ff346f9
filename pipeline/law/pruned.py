"""Checks which teachers can give the shapes of pruned students, and counts the parameters of these students.

A shape that a teacher cannot give is refused before anything is made. If such a pair were left out instead, the pruned
curve of the student would begin at another teacher than its curve with a common init.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from capgap.pipeline.plan.sizes import pruned_size
from capgap.pipeline.student.cut import pruned_config
from capgap.pipeline.student.shapes import shape_of, target_shape, teacher_config
from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.law import LawModel
from capgap.schemas.law_grid import LawGrid

# A stand-in for the vocabulary of teachers that are trained here, which is known only once the corpus is made. No size
# that is cut depends on it.
_ANY_VOCABULARY = 512

_APART = "make another grid of the pairs that fit, with `reuse` of what this one makes, or leave out one of the two"


def require_cuts(grid: LawGrid) -> None:
    """Refuse pruned students whose shape a teacher of the grid cannot give, by the teachers' configurations.

    Raises:
        InputError: A teacher cannot be read, or its architecture cannot be pruned.
        SettingError: A teacher is smaller than the student in a size, has heads of another width or of a number that
            does not divide, has exactly the student's shape, or ties embedding and head where the student does not, or
            the other way round.
    """
    if "pruned" not in grid.inits:
        return
    for teacher in grid.teachers:
        config = teacher_config(grid.teacher_settings(teacher), _ANY_VOCABULARY)
        for student in grid.students:
            try:
                _require_cut(grid, student, config)
            except (InputError, SettingError) as error:
                axis = str(error.where).removeprefix("student.prune.")
                raise type(error)(
                    error.what,
                    where=f"inits: pruned, students.{student} from teachers.{teacher}, {axis}",
                    found=error.found,
                    expected=error.expected,
                    fix=(error.fix or _APART).replace("student.prune", f"students.{student}.model"),
                ) from None


def pruned_sizes(grid: LawGrid, common: Mapping[str, LawModel], vocab_size: int) -> dict[str, LawModel]:
    """Return the sizes of the pruned students, by the students' names in the grid.

    A pruned student has the biases, the norms within heads and the padding rows of the embedding that its teacher has.
    Where this makes its size different from the same shape with fresh weights, it has another name in the table.

    Args:
        grid: The grid.
        common: Sizes of the shapes with fresh weights, by the students' names.
        vocab_size: Vocabulary size of the corpus.

    Raises:
        InputError: A teacher cannot be counted.
        SettingError: A teacher cannot give a student's shape, or teachers give one shape different sizes.
    """
    require_cuts(grid)
    return {student: _pruned_size(grid, student, common[student], vocab_size) for student in grid.students}


def _require_cut(grid: LawGrid, student: str, config: Any) -> None:
    settings, shape = grid.student_settings(student, "pruned").prune, grid.students[student].model
    assert settings is not None and shape is not None
    teacher = shape_of(config, "architecture")
    target = target_shape(teacher, settings)
    head_dim = shape.hidden_size // shape.num_heads
    if head_dim != teacher.head_dim:
        raise SettingError(
            "pruning keeps the width of a head",
            where="hidden_size / num_heads",
            found=head_dim,
            expected=f"the teacher's {teacher.head_dim}",
            fix=f"give student.prune heads of {teacher.head_dim}",
        )
    if target == teacher:
        raise SettingError("nothing is cut: the student has the teacher's shape", where="all sizes")
    if shape.tie_word_embeddings != config.tie_word_embeddings:
        raise SettingError(
            "a pruned student's embedding and head must be tied exactly where its teacher's are",
            where="tie_word_embeddings",
            found=str(shape.tie_word_embeddings).lower(),
            expected=f"the teacher's {str(config.tie_word_embeddings).lower()}",
            fix="set student.prune.tie_word_embeddings so, or make another grid of teachers with the other kind",
        )
    pruned_config(config, target, list(range(target.num_layers)))


def _pruned_size(grid: LawGrid, student: str, common: LawModel, vocab_size: int) -> LawModel:
    settings = grid.student_settings(student, "pruned").prune
    assert settings is not None
    found: dict[tuple[int, int], str] = {}
    for teacher in grid.teachers:
        size = pruned_size(None, settings, grid.teacher_settings(teacher), vocab_size)
        if size.total is None or size.outside_embedding is None:
            raise InputError("the model cannot be counted", where=f"teachers.{teacher}", found=size.where)
        found.setdefault((round(size.total), round(size.outside_embedding)), teacher)
    if len(found) > 1:
        sizes = [f"{total:,} parameters from {teacher}" for (total, _), teacher in found.items()]
        raise SettingError(
            "cut to one shape, teachers make students of different sizes",
            where=f"inits: pruned, students.{student}",
            found=", ".join(sizes),
            expected="one size: teachers of one architecture, with embeddings of one number of rows",
            fix="make a grid of each kind of teacher",
        )
    ((total, outside),) = found
    alike = (total, outside) == (common.num_parameters, common.num_non_embedding_parameters)
    name = common.name if alike else f"{common.name} (pruned)"
    return LawModel(name=name, num_parameters=total, num_non_embedding_parameters=outside)
