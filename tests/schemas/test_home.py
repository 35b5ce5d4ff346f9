"""`~` is the user's home folder where a setting is a path, and a character like any other elsewhere."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from capgap import schemas
from capgap.jobs.arguments import parse, parse_run, run_file_parser
from capgap.jobs.commands import verify_parser
from capgap.schemas.base import Record
from capgap.schemas.home import PATH, with_home
from capgap.schemas.interchange import ColumnNames
from capgap.schemas.run_cache import CacheSettings
from capgap.schemas.run_corpus import CorpusSettings
from capgap.schemas.run_judge import JudgeSettings
from capgap.schemas.run_model import TeacherSettings
from capgap.schemas.run_optimization import LoggerSettings
from capgap.schemas.run_rounds import RoundsSettings

TEXT = """
name: x
out: ~/runs/x
reuse: {cache: ~/runs/other/cache}
student: {path: ~/models/small}
train: {caches: {more: {path: ~/runs/third/cache, weight: 1}}}
arms: {a: {}}
"""

# Every text of a setting that is no path.
NO_PATHS = [
    *(f"ColumnNames.{name}" for name in ColumnNames.model_fields),
    "BenchmarkTask.metric",
    "Budget.students",
    "CorpusSettings.messages_field",
    "CorpusSettings.text_field",
    "EndpointSettings.api_key_env",
    "EndpointSettings.base_url",
    "JudgeSettings.model",
    "LawGrid.name",
    "LoggerSettings.class_path",
    "LoraSettings.target_modules",
    "OptimizationSettings.loggers",
    "QuantizeSettings.ignore",
    "RoundsSettings.answer_pattern",
    "RoundsSettings.off_policy_arms",
    "RoundsSettings.stop",
    "RunSections.name",
    "SourceSettings.text_field",
    "TeacherSettings.served",
    "TuneSettings.messages_field",
]


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


def test_in_a_setting_that_is_no_path_it_stays_as_it_is() -> None:
    rounds = RoundsSettings(prompts=("~/p.jsonl",), stop=("~", "~/"), answer_pattern="~/(a)")
    assert (rounds.stop, rounds.answer_pattern) == (("~", "~/"), "~/(a)")
    assert JudgeSettings(model="~/judge").model == TeacherSettings(served="~/judge").served == "~/judge"
    assert CorpusSettings(text_field="~").text_field == "~"


def test_arguments_of_vllm_and_of_loggers_may_be_paths(home: Path) -> None:
    assert CacheSettings(engine_args={"download_dir": "~/m"}).engine_args == {"download_dir": f"{home}/m"}
    read = LoggerSettings.read({"class_path": "tensorboard", "init_args": {"save_dir": "~/logs"}})
    assert read.init_args == {"save_dir": f"{home}/logs"}


def test_every_setting_of_text_is_marked_as_a_path_or_known_to_be_none() -> None:
    for file in Path(schemas.__file__).parent.glob("*.py"):
        importlib.import_module(f"capgap.schemas.{file.stem}")
    unmarked = {
        f"{record.__name__}.{name}"
        for record in _subclasses(Record)
        if record.__module__.rpartition(".")[2].startswith(("run_", "law_grid", "interchange"))
        for name in record.__annotations__.keys() & record.model_fields.keys()
        if _is_text(record.model_fields[name]) and PATH not in record.model_fields[name].metadata
    }
    assert sorted(unmarked) == sorted(NO_PATHS)


def _subclasses(record: type[Record]) -> Iterator[type[Record]]:
    for one in record.__subclasses__():
        yield one
        yield from _subclasses(one)


def _is_text(info: FieldInfo) -> bool:
    """Whether a setting is text or holds texts, other than the names of a mapping and the columns of a file."""
    kind = str(info.annotation).replace("dict[str, ", "")
    return re.search(r"\bstr\b|JsonValue", kind) is not None


@pytest.mark.parametrize("value", ["~no-such-user-here/x", "a/~", "s3://~/x", 5, None, True])
def test_what_names_no_home_stays(value: object) -> None:
    assert with_home(value) == value
    assert with_home([value, "~"])[0] == value and with_home({"a": (value,)}) == {"a": (value,)}
