"""The table of runs: what it takes and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from law_tables import cache, planted, run, size, teacher, valley

from capgap.pipeline.law.table import read_table, write_table
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.law import LawRun


def refused(tmp_path: Path, *runs: LawRun) -> str:
    path = tmp_path / "runs.jsonl"
    write_table(path, runs)
    with pytest.raises((InputError, MismatchError)) as caught:
        read_table(path)
    return str(caught.value)


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    runs = planted(valley(4.0), [1e6], [1, 4, 16])
    write_table(tmp_path / "runs.jsonl", runs)
    assert read_table(tmp_path / "runs.jsonl") == runs


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path, runs = tmp_path / "runs.jsonl", planted(valley(4.0), [1e6], [1, 4, 16])
    write_table(path, runs)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_table(path) == runs


def test_caches_of_different_recordings_are_refused_with_both(tmp_path: Path) -> None:
    student, small, large = size(1e6), teacher(1e6), teacher(4e6)
    other = cache(large, recording="topk", num_ids=64, profile="near-lossless")
    rows = (run(student, None, 0, 4.0), run(student, small, 0, 3.9), run(student, large, 0, 3.8, cache=other))
    said = refused(tmp_path, *rows)
    assert "caches of different recordings" in said
    assert "topk of 64, near-lossless, temperature 1" in said
    assert "sampled of 50, temperature 1" in said
    assert "t4000000" in said and "t1000000" in said


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"common": {"tokenizer": "xyz", "heldout": "def"}}, "tokenizer differs within one grid; found 'xyz'"),
        ({"common": {"tokenizer": "abc"}}, "heldout differs within one grid; found nothing"),
        ({"per_student": {"learning_rate": 0.5}}, "learning_rate differs within one student and budget; found 0.5"),
        ({"tokens": 3_000_000}, "tokens differ within one student and budget; found 3000000"),
    ],
)
def test_a_setting_that_must_be_equal_and_is_not_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    student = size(1e6)
    rows = (run(student, None, 0, 4.0), run(student, teacher(4e6), 0, 3.9, **changes))
    assert said in refused(tmp_path, *rows)


def test_a_learning_rate_may_differ_between_students(tmp_path: Path) -> None:
    rows = [run(size(1e6), one, 0, 4.0) for one in (None, teacher(4e6))]
    rows += [run(size(2e6), one, 0, 4.0, per_student={"learning_rate": 0.5}) for one in (None, teacher(4e6))]
    write_table(tmp_path / "runs.jsonl", rows)
    assert len(read_table(tmp_path / "runs.jsonl")) == 4


def test_one_name_for_two_teachers_is_refused(tmp_path: Path) -> None:
    student = size(1e6)
    rows = (
        run(student, None, 0, 4.0),
        run(student, teacher(4e6), 0, 3.9),
        run(student, teacher(4e6, loss=3.0), 1, 3.9),
    )
    assert "one name for two teachers" in refused(tmp_path, *rows)


def test_a_run_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    row = run(size(1e6), None, 0, 4.0)
    assert "twice; found m1000000, supervised, 2M, alpha 0, common, seed 0" in refused(tmp_path, row, row)


def test_a_table_without_the_supervised_arm_is_refused(tmp_path: Path) -> None:
    assert "no supervised run" in refused(tmp_path, run(size(1e6), teacher(4e6), 0, 3.9))


def test_a_table_without_a_teacher_is_refused(tmp_path: Path) -> None:
    assert "no distilled run" in refused(tmp_path, run(size(1e6), None, 0, 4.0))


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "Invalid JSON"),
        ('{"student": 3}', "student"),
        (run(size(1e6), None, 0, 4.0).model_dump_json().replace('"loss":4.0', '"loss":null'), "missing: expected"),
        (run(size(1e6), None, 0, 4.0).model_dump_json().replace('"loss":4.0', '"loss":-1'), "loss: found -1"),
        (run(size(1e6), None, 0, 4.0).model_dump_json().replace('"alpha":0.0', '"alpha":0.5'), "alpha: found 0.5"),
        (run(size(1e6), None, 0, 4.0).model_dump_json().replace("common", "pruned", 1), "init_source: expected"),
    ],
)
def test_a_line_that_is_no_run_is_refused_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(run(size(1e6), teacher(4e6), 0, 3.9).model_dump_json() + "\n\n" + line + "\n")
    with pytest.raises(InputError, match="line 3") as caught:
        read_table(path)
    assert said in str(caught.value)


def test_a_table_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such table"):
        read_table(tmp_path / "none.jsonl")
    (tmp_path / "runs.jsonl").write_text("\n")
    with pytest.raises(InputError, match="empty"):
        read_table(tmp_path / "runs.jsonl")


def test_the_row_that_the_documentation_shows_is_one() -> None:
    page = (Path(__file__).parents[3] / "docs" / "law.md").read_text()
    (shown,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    row = LawRun.model_validate_json(shown)
    assert row.name == "s-1M, t-4M, 2 tokens a parameter, alpha 1, common, seed 0"
