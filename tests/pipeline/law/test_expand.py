"""From the grid to run files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from capgap.pipeline.law.expand import cell, cells, corpus_run, teacher_run, write_run_file
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.workflow.graph import decisive_settings
from capgap.schemas.law import Init
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.run_file import RunFile

TOKENS = {"s": {"short": 1000, "long": 5000}}


def grid(out: Path, **changes: Any) -> LawGrid:
    shape = {"hidden_size": 32, "num_heads": 2}
    values = {
        "name": "g",
        "out": str(out),
        "seeds": [0, 7],
        "teachers": {"a": {"model": shape}, "b": {"path": "somewhere"}},
        "students": {"s": {"model": shape}},
        "budgets": {"short": {"tokens": 1000}, "long": {"tokens": 5000}},
        "alphas": [1.0, 0.5],
    }
    return LawGrid.model_validate(values | changes)


def test_a_supervised_run_stands_beside_each_student_budget_and_seed(tmp_path: Path) -> None:
    found = {one.name: one for one in cells(grid(tmp_path), TOKENS)}
    assert sorted(found) == [f"students/s/{who}/seed-{seed}" for who in ("a", "b", "supervised") for seed in (0, 7)]
    alone = found["students/s/supervised/seed-7"].run
    assert alone.arms == {
        "short-supervised": {"alpha": 0.0, "max_tokens": 1000},
        "long-supervised": {"alpha": 0.0, "max_tokens": 5000},
    }
    assert alone.seeds == (7,)
    assert set(found["students/s/b/seed-0"].run.arms) == {
        "short-alpha-1",
        "short-alpha-0.5",
        "long-alpha-1",
        "long-alpha-0.5",
    }


def test_runs_of_all_teachers_read_what_one_run_of_each_has_made(tmp_path: Path) -> None:
    asked = grid(tmp_path)
    assert corpus_run(asked).out == str(tmp_path)
    assert teacher_run(asked, "b").reuse == {"corpus": str(tmp_path / "corpus")}
    assert cell(asked, "s", "b", 0, TOKENS["s"]).run.reuse == {
        "corpus": str(tmp_path / "corpus"),
        "teacher": str(tmp_path / "teachers/b/teacher"),
        "cache": str(tmp_path / "teachers/b/cache"),
    }


def test_what_earlier_runs_have_made_takes_their_place(tmp_path: Path) -> None:
    asked = grid(tmp_path, reuse={"corpus": "c", "teachers": {"a": "t"}, "caches": {"a": "s3://bucket/cache"}})
    assert teacher_run(asked, "a").reuse == {"corpus": "c", "teacher": "t", "cache": "s3://bucket/cache"}
    assert cell(asked, "s", "a", 0, TOKENS["s"]).run.reuse == teacher_run(asked, "a").reuse


def test_first_weights_are_decided_by_student_and_seed_alone(tmp_path: Path) -> None:
    def first_weights(teacher: str | None, seed: int) -> object:
        run = cell(grid(tmp_path), "s", teacher, seed, TOKENS["s"]).run
        return decisive_settings(run, Instance("student", seed=seed))

    assert first_weights("a", 7) == first_weights("b", 7) == first_weights(None, 7) != first_weights("a", 0)


def test_a_pruned_student_is_cut_out_of_each_teacher_and_trained_with_it_and_alone(tmp_path: Path) -> None:
    asked = grid(tmp_path, inits=["common", "pruned"], prune={"importance": "taylor"}, alphas=[1.0])
    found = {one.name: one for one in cells(asked, TOKENS) if one.seed == 7}
    common = {f"students/s/{who}/seed-7" for who in ("a", "b", "supervised")}
    assert found.keys() - common == {f"students/s/{who}/pruned/seed-7" for who in ("a", "b")}
    pruned = found["students/s/b/pruned/seed-7"]
    assert (pruned.init, pruned.init_source, pruned.reads) == ("pruned", "b", "b")
    assert set(pruned.run.arms) == {"short-supervised", "long-supervised", "short-alpha-1", "long-alpha-1"}
    assert pruned.run.arms["long-supervised"] == {"alpha": 0.0, "max_tokens": 5000}
    assert pruned.run.reuse == found["students/s/b/seed-7"].run.reuse
    settings, shape = pruned.run.student.prune, asked.students["s"].model
    assert settings is not None and shape is not None
    for size in ("num_layers", "hidden_size", "num_heads", "intermediate_size"):
        assert getattr(settings, size) == getattr(shape, size)
    assert settings.num_key_value_heads == shape.num_heads and settings.importance == "taylor"
    order = [one.run.train_settings("short-alpha-1").decisive() for one in found.values() if one.reads == "b"]
    assert order[0] == order[1], "trained otherwise than the common one"


def test_another_init_changes_nothing_of_the_runs_of_the_common_one(tmp_path: Path) -> None:
    plain = {one.name: one for one in cells(grid(tmp_path), TOKENS)}
    more = {one.name: one for one in cells(grid(tmp_path, inits=["common", "pruned"]), TOKENS)}
    assert {name: more[name] for name in plain} == plain
    alone = {one.name for one in cells(grid(tmp_path, inits=["pruned"]), TOKENS)}
    assert alone == more.keys() - plain.keys()


@pytest.mark.parametrize("init", ["common", "pruned"])
def test_an_expanded_run_file_is_the_run(tmp_path: Path, init: Init) -> None:
    run = cell(grid(tmp_path), "s", "b", 7, TOKENS["s"], init=init).run
    path = write_run_file(run)
    assert path == tmp_path / "students/s/b" / ("pruned" if init == "pruned" else "") / "seed-7/run.yaml"
    assert RunFile.model_validate(yaml.safe_load(path.read_text())) == run


def test_a_budget_may_be_of_some_students_and_have_alphas_of_its_own(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_heads": 2}
    students = {"s": {"model": shape}, "u": {"model": shape}}
    budgets = {"none": {"tokens": 0}, "short": {"tokens": 1000, "students": ["s"], "alphas": [0.3]}}
    asked = grid(tmp_path, students=students, budgets=budgets, alphas=[1.0])
    found = {one.name: one for one in cells(asked, {name: {"none": 0, "short": 1000} for name in students})}
    arms = {name: set(found[f"students/{name}/seed-0"].run.arms) for name in ("s/a", "s/supervised", "u/a")}
    assert arms == {
        "s/a": {"none-alpha-1", "short-alpha-0.3"},
        "s/supervised": {"none-supervised", "short-supervised"},
        "u/a": {"none-alpha-1"},
    }
    for wrong, said in (
        ({"b": {"tokens": 1, "students": ["x"]}}, "budgets.b.students: found 'x'"),
        ({"b": {"tokens": 1, "students": ["s"]}}, "students.u: found no budget for it"),
        ({"b": {"tokens": 1, "alphas": [0.0]}}, "budgets: found \\[0.0\\], expected numbers above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            grid(tmp_path, students=students, budgets=wrong)
