"""The grid file: what it refuses, and what its settings come to for each model."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from capgap.schemas.law_grid import Budget, LawGrid

SMALL: dict[str, Any] = {
    "name": "g",
    "out": "runs/g",
    "teachers": {"t": {"model": {}}, "u": {"model": {}, "training": {"learning_rate": 1e-2, "num_epochs": 1}}},
    "students": {"s": {"model": {}}, "r": {"model": {"hidden_size": 96}}},
    "budgets": {"short": {"tokens": 1000}},
}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"alphas": [0.0, 1.0]}, "the supervised arm comes by itself"),
        ({"alphas": []}, "alphas: found"),
        ({"train": {"alpha": 0.5}}, "train.alpha: found in a grid, expected alphas"),
        ({"train_of": {"s": {"max_tokens": 5}}}, "train.max_tokens: found in a grid, expected budgets"),
        ({"train_of": {"s": {"learning_rat": 5}}}, "train_of.s.learning_rat\n  Extra inputs are not permitted"),
        ({"train_of": {"q": {}}}, "train_of: found 'q', expected one of s, r"),
        ({"train": {"targets": "online"}}, "one teacher through its cache"),
        ({"teachers": {}}, "teachers: found none"),
        ({"teachers": {"t": {"served": "one"}}}, "teachers.t.served: found in a grid, expected path or model"),
        ({"cache": {"engine": "server", "recording": "topk"}}, "cache.engine: found server in a grid"),
        ({"teachers": {"supervised": {"model": {}}}}, "teachers: found the name 'supervised'"),
        ({"students": {"a/b": {"model": {}}}}, "students: found the name 'a/b'"),
        ({"reuse": {"caches": {"v": "x"}}}, "reuse.caches: found 'v', expected one of t, u"),
        ({"teacher_training": {"alpha": 1.0}}, "teacher_training.alpha\n  Extra inputs are not permitted"),
        ({"budgets": {"short": {"tokens": 1, "tokens_per_parameter": 1}}}, "found both of tokens"),
        ({"budgets": {"short": {}}}, "found neither of tokens"),
        ({"seeds": [1, 1]}, "none twice"),
        ({"inits": []}, "inits: found \\[\\], expected at least one of common and pruned"),
        ({"inits": ["pruned", "pruned"]}, "none twice"),
        ({"inits": ["cut"]}, "Input should be 'common' or 'pruned'"),
        ({"prune": {"importance": "taylor"}}, "prune: found with inits .*, expected it where inits has pruned"),
        ({"inits": ["pruned"], "prune": {"num_layers": 2}}, "prune.num_layers: found in a grid, expected the shapes"),
        ({"students": {"s": {"prune": {}}}}, "students.s.prune: found in a grid, expected a model and inits"),
        ({"inits": ["pruned"], "students": {"s": {"path": "x"}}}, "students.s: found path, expected a model"),
    ],
)
def test_what_cannot_be_a_grid_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LawGrid.model_validate(SMALL | changes)


def test_a_teacher_s_own_training_wins_over_the_shared_one_even_where_it_says_the_default() -> None:
    grid = LawGrid.model_validate(SMALL | {"teacher_training": {"learning_rate": 5e-3, "num_epochs": 4}})
    assert (grid.teacher_settings("t").recipe.learning_rate, grid.teacher_settings("t").recipe.num_epochs) == (5e-3, 4)
    assert (grid.teacher_settings("u").recipe.learning_rate, grid.teacher_settings("u").recipe.num_epochs) == (1e-2, 1)


def test_a_given_teacher_is_not_trained() -> None:
    grid = LawGrid.model_validate(
        SMALL | {"teachers": {"t": {"path": "somewhere"}}, "teacher_training": {"num_epochs": 2}}
    )
    assert grid.teacher_settings("t").training is None


def test_a_student_s_own_settings_win() -> None:
    grid = LawGrid.model_validate(SMALL | {"train": {"batch_sequences": 4}, "train_of": {"s": {"learning_rate": 0.1}}})
    assert (grid.train_settings("s").learning_rate, grid.train_settings("s").batch_sequences) == (0.1, 4)
    assert grid.train_settings("r").learning_rate == 3e-3


def test_a_budget_is_one_rule_for_all_students() -> None:
    assert Budget(tokens=100).tokens_of(7) == 100
    assert Budget(tokens_per_parameter=20).tokens_of(1_000_000) == 20_000_000
