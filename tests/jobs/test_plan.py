from __future__ import annotations

import json
from pathlib import Path

import pytest

from capgap.jobs.cli import main
from capgap.schemas.plan import RunPlan

DEMO = str(Path(__file__).parents[2] / "jobs" / "runs" / "demo.yaml")


@pytest.fixture
def out(tmp_path: Path) -> list[str]:
    return ["--out", str(tmp_path / "out"), "--device", "cpu"]


def test_the_table_names_every_stage_and_the_lines_say_where_figures_come_from(
    out: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--device-peak-tflops", "0.1", "--mfu", "0.5", "--teacher-tokens-per-s", "9000"]
    assert main(["plan", DEMO, *out, *flags]) == 0
    said = capsys.readouterr().out
    for stage in ("corpus", "teacher", "cache", "student/seed-0", "train/distilled/seed-0", "eval", "report"):
        assert f"\n{stage} " in said
    for words in ("9,000", "stated", "benchmarks/results/", "B free", "from 2 students on", "arXiv:2311.07052"):
        assert words in said
    assert "?" not in said.split("teacher: ")[0], "every figure is known"
    assert not Path(out[1]).exists(), "nothing is made"


def test_json_is_the_plan(out: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", DEMO, *out, "--json"]) == 0
    plan = RunPlan.model_validate_json(capsys.readouterr().out)
    assert plan.name == "demo" and plan.num_students == 1


def test_in_the_log_s_json_it_is_one_line(
    out: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPGAP_LOG_FORMAT", "text")
    assert main(["plan", DEMO, *out, "--log-format", "json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record["event"] == "plan" and RunPlan.model_validate(record["fields"]).name == "demo"


def test_a_disk_that_is_too_small_is_said(out: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", DEMO, *out, "--text-bytes-per-token", "1e-12", "--cache.max_tokens", "null"]) == 0
    assert "NOT ENOUGH" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--mfu", "0.4"], "belong together"),
        (["--device-peak-tflops", "900", "--mfu", "40"], "--mfu: no share; found 40"),
        (["--train-tokens-per-s", "-1"], "--train-tokens-per-s: no rate; found -1"),
    ],
)
def test_a_rate_that_is_none_is_refused(
    out: list[str], flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", DEMO, *out, *flags]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("command", [["plan", DEMO], ["law", "plan", "law-smoke"]])
@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_a_finished_stage_is_no_run_to_be_like(
    command: list[str], there: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "none"
    if there:
        folder.mkdir()
    assert main([*command, "--out", str(tmp_path / "out"), "--like", str(folder)]) == 2
    found = str(folder) if there else f"{folder}, which is no folder"
    said = f"capgap: --like: the folder holds no finished stage whose rate could be used; found {found}, expected the"
    assert said in capsys.readouterr().err
