"""`capgap law` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from law_tables import planted, valley

from capgap.jobs.cli import main
from capgap.pipeline.law.table import write_table


def table(folder: Path) -> Path:
    path = folder / "runs.jsonl"
    write_table(path, planted(valley(4.0), [1e6], np.geomspace(1, 32, 6).tolist()))
    return path


def test_a_table_becomes_a_fit_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path)
    assert main(["law", "fit", str(path), "--out", str(tmp_path / "law")]) == 0
    said = capsys.readouterr().out
    assert "over size: interior." in said and "no law: sizes of students" in said
    assert main(["law", "report", str(tmp_path / "law")]) == 0
    assert (tmp_path / "law" / "law.html").read_text().startswith("<!DOCTYPE html>")
    assert json.loads((tmp_path / "law" / "law.json").read_text())["num_runs"] == 21


def test_flags_of_fit_reach_it(tmp_path: Path) -> None:
    path = table(tmp_path)
    assert main(["law", "fit", str(path), "--size", "non_embedding", "--delta", "0.02"]) == 0
    fit = json.loads((tmp_path / "law.json").read_text())
    assert fit["size"] == "non_embedding"
    assert fit["curves"][0]["delta"] == 0.02


def test_advice_needs_no_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["law", "advise", "--student", "3B", "--tokens", "126B", "--teachers", "7B,13B,70B"]) == 0
    said = capsys.readouterr().out
    assert "law of capacity gap" in said and "distillation scaling law" in said
    assert "disagreement: best sizes are" in said


def test_advice_from_a_fit_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["law", "fit", str(table(tmp_path))]) == 0
    capsys.readouterr()
    flags = ["--student", "1M", "--tokens", "2M", "--teachers", "2M,4M", "--teacher-tokens", "40M,80M"]
    assert main(["law", "advise", *flags, "--fit", str(tmp_path), "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)
    assert [answer["source"].split(":")[0].split(" ")[0] for answer in advice["answers"]] == [
        "fit",
        "law",
        "distillation",
    ]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["frobnicate"],
            "no such command; found frobnicate, expected one of plan, run, table, submit, fit, report, advise",
        ),
        (["fit", "none.jsonl"], "none.jsonl: no such table"),
        (["fit", "none.jsonl", "--delta", "0"], "--delta: not a difference"),
        (["fit", "none.jsonl", "--delta", "inf"], "--delta: not a difference"),
        (["report", "none"], "there is no fit"),
        (["advise", "--student", "big", "--tokens", "1B", "--teachers", "7B"], "--student: not a count; found big"),
        (["advise", "--student", "1B", "--tokens", "1B"], "teachers"),
        (
            ["advise", "--student", "1B", "--tokens", "1B", "--teachers", "7B,9B,8B", "--teacher-tokens", "1T,2T"],
            "--teacher-tokens: not as many as teachers; found 2, expected 1 or 3",
        ),
    ],
)
def test_what_a_person_mistypes_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["law", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        assert main(["law", *arguments]) == 0
        said = capsys.readouterr().out
        assert [line.split()[1] for line in said.splitlines() if line.startswith("  law ")] == [
            "plan",
            "run",
            "table",
            "submit",
            "fit",
            "report",
            "advise",
        ]
