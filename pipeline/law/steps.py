"""Checks that every training of a grid takes at least one step, before anything of the grid is made."""

from __future__ import annotations

from capgap.pipeline.law.expand import corpus_run
from capgap.pipeline.law.sizes import sizes_of, tokens_by_student, vocab_size_of_grid
from capgap.pipeline.stage.steps import require_a_step, seq_len_of
from capgap.schemas.law_grid import LawGrid


def require_steps(grid: LawGrid) -> None:
    """Refuse budgets and teachers' trainings that stop before their first step.

    Budgets in tokens per parameter are checked only where the vocabulary is known, because students cannot be counted
    without it.

    Raises:
        SettingError: A training stops before its first step.
        InputError: A given model, or something that is reused, cannot be read.
    """
    seq_len = seq_len_of(corpus_run(grid), ("corpus",))
    for name in grid.teachers:
        teacher = grid.teacher_settings(name)
        if teacher.optimization is not None and name not in grid.reuse.teachers:
            part = "adapt" if teacher.is_given else "training"
            recipe, where = teacher.optimization, f"teachers.{name}.{part}.max_tokens"
            require_a_step(recipe.max_tokens, recipe.batch_sequences, seq_len, where)
    vocab_size = vocab_size_of_grid(grid)
    counted = tokens_by_student(grid, sizes_of(grid, vocab_size)) if vocab_size else {}
    for student in grid.students:
        batch_sequences = grid.train_settings(student).batch_sequences
        for name, budget in grid.budgets.items():
            tokens = budget.tokens if budget.tokens is not None else counted.get(student, {}).get(name)
            if budget.has(student):
                where = f"budgets.{name}, students.{student}"
                require_a_step(tokens, batch_sequences, seq_len, where)
