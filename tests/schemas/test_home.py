"""`~` is the user's home folder wherever a setting is a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from capgap.jobs.arguments import parse, parse_run, run_file_parser
from capgap.jobs.commands import verify_parser
from capgap.schemas.home import with_home

TEXT = """
name: x
out: ~/runs/x
reuse: {cache: ~/runs/other/cache}
student: {path: ~/models/small}
train: {caches: {more: {path: ~/runs/third/cache, weight: 1}}}
arms: {a: {}}
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paths_of_a_run_file_and_of_flags_may_begin_at_home(home: Path) -> None:
    (home / "run.yaml").write_text(TEXT)
    run = parse_run(run_file_parser("capgap run", ""), ["--config=~/run.yaml"]).settings
    assert (run.out, run.reuse["cache"]) == (f"{home}/runs/x", f"{home}/runs/other/cache")
    assert run.student.path == f"{home}/models/small" and run.train.caches["more"].path == f"{home}/runs/third/cache"
    run = parse_run(run_file_parser("capgap run", ""), ["~/run.yaml", "--out=~/y"]).settings
    assert run.out == f"{home}/y"
    assert parse(verify_parser(), ["~/runs", "--teacher=~/given"])["folders"] == [f"{home}/runs"]


@pytest.mark.parametrize("value", ["~no-such-user-here/x", "a/~", "s3://~/x", 5, None, True])
def test_what_names_no_home_stays(value: object) -> None:
    assert with_home(value) == value
    assert with_home([value, "~"])[0] == value and with_home({"a": (value,)}) == {"a": (value,)}
