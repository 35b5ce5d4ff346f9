"""Run files of one's own, and those that are shipped, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capgap.jobs.cli import main
from capgap.jobs.init import USES, run_file_text
from capgap.jobs.reader import read_settings
from capgap.jobs.shipped import FOLDER, find_file, shipped_names
from capgap.pipeline.workflow.graph import instances
from capgap.schemas.run_file import RunFile


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("use", USES)
def test_what_is_written_is_a_run_file_of_that_name(use: str, folder: Path) -> None:
    assert main(["init", "mine", "--use", use]) == 0
    text = (folder / "mine.yaml").read_text()
    assert text == run_file_text("mine", use) and all("#" in line for line in text.splitlines()[:3])
    run = read_settings(RunFile, "mine.yaml")
    assert (run.name, run.out) == ("mine", "runs/mine")
    stages = {instance.stage for instance in instances(run)}
    assert {"shards": "cache", "train": "train", "all": "report"}[use] in stages
    if use != "all":
        assert not stages & {"shards": {"student", "train"}, "train": {"corpus", "teacher", "cache"}}[use]


def test_nothing_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.yaml").write_text("mine")
    assert main(["init"]) == 2
    line = "run.yaml: is there already; give another NAME, as in `capgap init NAME`"
    assert capsys.readouterr().err == f"capgap: {line}\n"
    assert (folder / "run.yaml").read_text() == "mine"
    (folder / "gone.yaml").symlink_to(folder / "elsewhere")
    assert main(["init", "gone"]) == 2
    assert not (folder / "elsewhere").exists(), "nor is anything written through a link"


@pytest.mark.parametrize("name", ["a/b", "..", "", "-x", "a b"])
def test_a_name_that_is_no_file_s_is_refused(name: str, folder: Path) -> None:
    assert main(["init", name]) == 2
    assert list(folder.iterdir()) == []


def test_shipped_run_files_are_listed_with_their_first_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped_names()
    assert all(len(line.split()) > 5 for line in lines), "each says what it is"
    assert main(["ls", "--json"]) == 0
    assert {one["name"] for one in json.loads(capsys.readouterr().out)} == set(shipped_names())


def test_a_shipped_run_file_is_taken_by_its_name_from_any_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "demo"]) == 0
    assert "corpus" in capsys.readouterr().out
    assert main(["law", "plan", "law-smoke", "--json"]) == 0
    assert find_file("demo.yaml") == FOLDER / "demo.yaml"


def test_a_path_wins_over_a_name(folder: Path) -> None:
    (folder / "demo").write_text("{}")
    assert find_file("demo") == Path("demo")
    Path("demo").unlink()
    assert find_file("demo") == FOLDER / "demo.yaml"
    (folder / "demo").mkdir()
    assert find_file("demo") == FOLDER / "demo.yaml", "a folder of the run's name is no run file"


def test_the_runs_of_a_folder_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("corpus", "train/distilled/seed-0", "train/distilled/seed-1"):
        (folder / "runs" / "a" / stage).mkdir(parents=True)
        (folder / "runs" / "a" / stage / "manifest.json").write_text("{}")
    (folder / "runs" / "deep" / "b" / "cache").mkdir(parents=True)
    (folder / "runs" / "deep" / "b" / "cache" / "work.json").write_text("{}")
    assert main(["ls", "runs"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [[part.strip() for part in line if part] for line in lines] == [
        ["runs/a", "stages: 3 finished"],
        ["runs/deep/b", "stages: 1 unfinished"],
    ]
    assert main(["ls", "nowhere"]) == 2


def test_a_grid_file_is_no_run_file_and_the_other_way_round(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "law-smoke"]) == 2
    assert "found a grid file, expected a run file; did you mean capgap law run" in capsys.readouterr().err
    assert main(["law", "run", "demo"]) == 2
    assert "found a run file, expected a grid; did you mean capgap run" in capsys.readouterr().err
