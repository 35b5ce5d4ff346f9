"""`capgap.run` walks a run file as the command does, and says where its results are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_folders import finish_folder

import capgap
from capgap.pipeline.workflow.graph import instances
from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.run_file import RunFile


@pytest.fixture
def run_file(made) -> Path:
    """Of a run whose corpus is made."""
    return made[0] / "run.yaml"


def test_a_run_file_is_walked_and_says_where_its_stages_lie(run_file: Path) -> None:
    settings = yaml.safe_load(run_file.read_text())
    result = capgap.run(run_file, only="corpus")
    assert result.made == ()
    assert result.folders == {"corpus": Path(settings["out"]) / "corpus"}
    assert result.out == Path(settings["out"]) and result.report == {}
    assert repr(result).startswith("RunResult(out=")


def test_a_report_comes_back_as_long_as_it_is_of_what_is_there(tmp_path: Path) -> None:
    values: dict[str, Any] = {"name": "run", "out": str(tmp_path), "corpus": {}, "teacher": {"path": "given"}}
    values |= {"cache": {}, "student": {"path": "given"}, "train": {}, "eval": {}}
    run = RunFile.model_validate(values)
    for instance in instances(run):
        finish_folder(run, instance.name, '{"name": "small"}', "report.json")
    assert capgap.run(values).report == {"name": "small"}
    assert capgap.run(values, only="corpus", **{"train.learning_rate": 0.5}).report == {}


def test_what_is_missing_is_made_in_a_process_of_its_own(
    run_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = capgap.run(yaml.safe_load(run_file.read_text()), only="corpus", out=str(tmp_path))
    assert result.made == ("corpus",)
    assert (result.folders["corpus"] / "manifest.json").is_file()
    assert result.report == {}
    assert "corpus: never made" in capfd.readouterr().out


def test_settings_are_laid_over_by_section_and_by_dotted_name(run_file: Path) -> None:
    settings: dict[str, Any] = {"train.learning_rate": 1e-4}
    settings |= {"train": {"alpha": 0.5}, "student.model": {"num_layers": 2}, "student.model.num_heads": 4}
    used = capgap.run(run_file, only="corpus", **settings).run
    assert (used.train.learning_rate, used.train.alpha) == (1e-4, 0.5)
    assert used.student.model is not None
    assert (used.student.model.num_layers, used.student.model.num_heads) == (2, 4)
    assert used.student.model.hidden_size == 32


def test_a_logger_of_the_callers_own_class_reaches_the_stages(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPGAP_LOGGER_CLASSES", "")
    own = {"loggers": ({"class_path": "mine.Logger"},)}
    settings: dict[str, Any] = {"train": own, "arms": {"a": {"loggers": [{"class_path": "mine.Other"}]}}}
    result = capgap.run(run_file, only="corpus", out=str(tmp_path), **settings)
    assert result.made == ("corpus",)


def test_a_dict_that_may_be_a_strangers_names_no_class(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPGAP_LOGGER_CLASSES", "")
    values = yaml.safe_load(run_file.read_text()) | {"train": {"loggers": ({"class_path": "mine.Logger"},)}}
    with pytest.raises(SettingError, match=r"train\.loggers.*cannot name a class.*to capgap\.run as train="):
        capgap.run(values, only="corpus")


def test_a_shipped_run_file_goes_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no such stage"):
        capgap.run("demo", only="nothing", out=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"train.lerning_rate": 1.0}, r"run\.yaml, line \d+: train\.lerning_rate: no such setting"),
        ({"train": {"alpha": 2}}, r"train\.alpha"),
        ({"train": {"learning_rate": float("inf")}}, r"train\.learning_rate: .*expected a number that is finite"),
        ({"arms.a": {"clip_norm": float("nan")}}, r"arms\.a\.clip_norm: .*found nan"),
        ({"only": "corpus", "from_stage": "cache"}, "exclude each other"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(run_file: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        capgap.run(run_file, **settings)


@pytest.mark.parametrize("text, words", [("a: [", "not a YAML file"), ("- a\n", "not a run file; found a list")])
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        capgap.run(tmp_path / "run.yaml")


def test_a_run_file_that_is_nowhere_is_refused_with_the_shipped_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such run file; .*`capgap ls` lists examples"):
        capgap.run(tmp_path / "run.yaml")
    with pytest.raises(InputError, match="no such run file; did you mean demo, which is shipped"):
        capgap.run("demos")
