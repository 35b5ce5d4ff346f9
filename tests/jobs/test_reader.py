"""Settings from their file and from flags: read once, checked once, every problem with its line or its flag."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from capgap.jobs.arguments import Parser, parse_run, parse_settings, run_file_parser
from capgap.jobs.cli import main
from capgap.jobs.reader import read_settings
from capgap.schemas.errors import InputError, SettingError, SettingsError
from capgap.schemas.interchange import ImportSettings
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_train import FurtherCache

BASE = "name: x\nout: runs/x\ncorpus: {}\nteacher: {path: a}\ncache: {}\nstudent: {path: b}\n"


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The run file of a text, with flags as a person types them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAPGAP_LOGGER_CLASSES", "")

    def of(text: str, *flags: str) -> RunFile:
        Path("run.yaml").write_text(text)
        return parse_run(run_file_parser("capgap run", ""), ["run.yaml", *flags]).settings

    return of


def test_every_problem_is_a_line_in_the_order_of_the_file(read: Any) -> None:
    text = (
        BASE.replace("cache: {}", "cache: {k: 5}")
        + "train:\n  lr: 1\n  alpha: 3\n  batch_sequences: [8]\narms: {1: {}, a: 3}\n"
    )
    with pytest.raises(SettingsError) as error:
        read(text, "--device", "gpu", "--nmae", "y")
    assert str(error.value).splitlines() == [
        "--nmae: no such setting; found y; did you mean --name?",
        "run.yaml, line 5: cache.k: no such setting; found 5; did you mean top_k?",
        "run.yaml, line 8: train.lr: no such setting; found 1; did you mean learning_rate?",
        "run.yaml, line 9: train.alpha: cannot be used; found 3, expected at most 1",
        "run.yaml, line 10: train.batch_sequences: cannot be used; found [8], expected an integer",
        "run.yaml, line 11: arms.1: cannot be used; found 1, expected text for a name; write it in quotes",
        "run.yaml, line 11: arms.a: cannot be used; found 3, expected settings by name",
        "--device: cannot be used; found gpu, expected one of auto, cpu or cuda",
    ]


def test_a_misspelt_name_below_a_section_of_fixed_names_is_met_with_those_that_there_are(read: Any) -> None:
    text = BASE.replace("corpus: {}", "corpus: {max_tokens: {studnet: 5, 3: 5}}") + "reuse: {cahce: runs/x}\n"
    with pytest.raises(SettingsError) as error:
        read(text, "--reuse.teachre", "runs/y")
    expected = "expected one of corpus, teacher or cache; did you mean"
    splits = "expected one of teacher, student or heldout"
    assert str(error.value).splitlines() == [
        f"run.yaml, line 3: corpus.max_tokens.studnet: no such name; found studnet, {splits}; did you mean student?",
        f"run.yaml, line 3: corpus.max_tokens.3: no such name; found 3, {splits}",
        f"run.yaml, line 7: reuse.cahce: no such name; found cahce, {expected} cache?",
        f"--reuse.teachre: no such name; found teachre, {expected} teacher?",
    ]


@pytest.mark.parametrize(
    ("written", "where"),
    [
        ("seeds: [true]", "line 7: seeds"),
        ("train: {batch_sequences: yes}", "line 7: train.batch_sequences"),
        ("train: {learning_rate: off}", "line 7: train.learning_rate"),
        ("train: {}\narms: {a: {alpha: true}}", "line 8: arms.a.alpha"),
    ],
)
def test_true_and_false_are_no_numbers(read: Any, written: str, where: str) -> None:
    found = "false" if "off" in written else "[true]" if "seeds" in written else "true"
    with pytest.raises(SettingError) as error:
        read(f"{BASE}{written}\n")
    assert str(error.value) == f"run.yaml, {where}: found {found}, expected a number"
    assert read(f"{BASE}seeds: [1]\ntrain: {{activation_checkpointing: on}}\n").train.activation_checkpointing


def test_a_word_that_yaml_takes_for_true_is_told_as_it_is_written(read: Any) -> None:
    with pytest.raises(SettingError) as error:
        read(BASE.replace("name: x", "name: on"))
    assert str(error.value) == 'run.yaml, line 1: name: cannot be used; found on, expected text; write "on"'


@pytest.mark.parametrize(
    ("text", "found"),
    [("a: 1\n---\nb: 2\n", "another document"), ("a: [1\nb: 2\n", "':'"), ("a: ]\n", "']'")],
)
def test_what_is_no_yaml_is_said_without_saying_found_twice(read: Any, text: str, found: str) -> None:
    with pytest.raises(InputError) as error:
        read(text)
    assert f"not a YAML file; found {found}, expected YAML" in str(error.value)


def test_two_files_by_flag_are_refused_as_two_by_place_are(read: Any) -> None:
    for name in ("a.yaml", "b.yaml"):
        Path(name).write_text(BASE)
    with pytest.raises(SettingError, match="two files are named"):
        read(BASE, "--config", "a.yaml")
    with pytest.raises(SettingError, match=r"two files are named; found a.yaml and b.yaml, expected one"):
        parse_run(run_file_parser("capgap run", ""), ["--config", "a.yaml", "--config=b.yaml"])


def test_each_problem_is_a_line_of_its_own_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPGAP_LOG_FORMAT", "text")
    path = tmp_path / "run.yaml"
    path.write_text(BASE + "seeds: 3\ndevice: gpu\n")
    assert main(["status", str(path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"capgap: {path}, line 7: seeds: ") and second.startswith(f"capgap: {path}, line 8: device")
    assert main(["status", str(path), "--log-format", "json"]) == 2
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [record["fields"]["where"].rpartition(": ")[2] for record in records] == ["seeds", "device"]
    assert {record["event"] for record in records} == {"failed"}


@pytest.mark.parametrize("bare", ["eval:", "cache:", "train:", "corpus: # nothing yet", "reuse:", "arms:"])
def test_a_bare_section_is_one_with_its_defaults(read: Any, bare: str) -> None:
    name = bare.partition(":")[0]
    others = BASE.replace(f"{name}: {{}}\n", "")
    run, same = read(f"{others}{bare}\n"), read(BASE)
    assert getattr(run, name) == getattr(same, name)
    assert (name in run.model_fields_set) == (name not in ("reuse", "arms")), "and it is written"


def test_a_bare_section_that_is_optional_is_asked_for(read: Any) -> None:
    assert read(BASE + "eval:\n  speculative:\n").eval.speculative is not None
    assert read(BASE + "eval:\n  speculative: null\n").eval.speculative is None
    assert read(BASE + "arms:\n  distilled:\n").arms == {"distilled": {}}
    with pytest.raises(SettingError, match=r"run.yaml, line 7: tune: found neither of sources and cache"):
        read(BASE + "tune:\n")
    with pytest.raises(SettingError, match=r"run.yaml, line 7: name: cannot be used; found null, expected text"):
        read(BASE.removeprefix("name: x\n") + "device: cpu\nname:\n")


def test_flags_make_sections_and_the_last_one_wins(read: Any) -> None:
    run = read(BASE, "--train.alpha", "0.5", "--train.alpha=0.25", "--arms.a.alpha", "0", "--arms.b", "{}")
    assert run.train.alpha == 0.25 and run.arms == {"a": {"alpha": 0}, "b": {}}
    assert read(BASE, "--cache", "{recording: topk}", "--cache.top_k", "9").cache.top_k == 9
    assert read(BASE, "--cache.recording", "topk", "--cache", "{num_samples: 9}").cache.recording == "sampled"
    assert read(BASE + "eval: {speculative: {}}\n", "--eval.speculative", "null").eval.speculative is None
    assert read(BASE, "--teacher.path", "null", "--teacher.model", "{}").teacher.model is not None
    assert read(BASE, "--seeds", "[1, 2]").seeds == (1, 2)


def test_numbers_of_flags_are_those_of_everybody_s_habit(read: Any) -> None:
    run = read(BASE, "--train.learning_rate", "1e-3", "--cache.max_tokens", "1e6", "--train.weight_decay=1.5E-2")
    assert (run.train.learning_rate, run.cache.max_tokens, run.train.weight_decay) == (1e-3, 10**6, 0.015)
    assert read(BASE + "train: {learning_rate: 2e-4}\n").train.learning_rate == 2e-4


def test_text_is_taken_as_it_stands(read: Any) -> None:
    run = read(BASE, "--name", "007", "--corpus.text_field", "yes", "--teacher.path", "*odd: {", "--out=")
    assert (run.name, run.corpus.text_field, run.teacher.path, run.out) == ("007", "yes", "*odd: {", "")
    with pytest.raises(SettingError, match=r'line 1: name: cannot be used; found 7, expected text; write "7"'):
        read(BASE.replace("name: x", "name: 7"))


def test_names_of_the_user_s_may_hold_dots_where_the_file_has_them(read: Any) -> None:
    run = read(BASE + "arms: {v1.5: {alpha: 1}, v1: {}}\n", "--arms.v1.5.alpha", "0.5")
    assert run.arms == {"v1.5": {"alpha": 0.5}, "v1": {}}


def test_further_caches_are_flags_in_either_form(read: Any) -> None:
    flags = ["--train.caches.code.path", "s3://caches/code", "--train.caches.code.weight", "2"]
    assert read(BASE, *flags).train.caches == {"code": FurtherCache(path="s3://caches/code", weight=2)}
    assert read(BASE, "--train.caches", "{code: {path: s3://caches/code, weight: 2}}").train.caches == {
        "code": FurtherCache(path="s3://caches/code", weight=2)
    }


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--cache.top_k", "5"], "--cache.top_k: found with recording sampled, expected topk; use cache.num_samples"),
        (
            ["--train.batch_sequences", "8", "--train.micro_batch_sequences", "3"],
            "--train.micro_batch_sequences: found 3, expected a divisor of batch_sequences = 8",
        ),
        (
            ["--corpus.teacher_fraction", "0.95"],
            "--corpus.teacher_fraction: corpus.teacher_fraction + corpus.heldout_fraction: found 1.01, "
            "expected less than 1; nothing is left for the student",
        ),
        (["--corpus.sources", "5"], "--corpus.sources: cannot be used; found 5, expected a list; write [5]"),
        (
            ["--corpus.sources", "*.txt"],
            "--corpus.sources: not YAML; found '*.txt': expected alphabetic or numeric character, but found '.'; "
            "write '[\"*.txt\"]'",
        ),
        (["--arms.a.alpha", "3"], "--arms.a.alpha: cannot be used; found 3, expected at most 1"),
        (["--arms", "{a: {alpha: 3}}"], "--arms: arms.a.alpha: cannot be used; found 3, expected at most 1"),
        (["--train.alpha.x", "3"], "--train.alpha.x: no such setting; found 3; did you mean --train.alpha?"),
        (["--corpus.sources.0", "x"], "--corpus.sources.0: no such setting; found x; did you mean --corpus.sources?"),
        (["--cache.seed", ".inf"], "--cache.seed: cannot be used; found inf, expected a number that is finite"),
        (["--teacher", "org/model"], "--teacher: cannot be used; found org/model, expected settings by name; "
         "write {path: org/model}"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_problem_of_a_flag_names_the_flag(read: Any, flags: list[str], line: str) -> None:
    with pytest.raises(SettingError) as error:
        read(BASE, *flags)
    assert str(error.value) == line


@pytest.mark.parametrize(
    "text", [b"\xff\xfen\x00a\x00m\x00e\x00", b"name: \x00", b"- a\n- b\n", b"5\n", b"---\nname: x\n---\nname: y\n"]
)
def test_what_is_no_run_file_is_one_line(text: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    assert main(["status", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"capgap: {path}")


def test_merged_settings_stand_below_those_that_are_written_and_keep_their_lines(read: Any) -> None:
    text = BASE + "arms:\n  a: &a {alpha: 0.5, weight_decay: 0}\n  b: {<<: *a, alpha: 0.25}\n"
    assert read(text).arms["b"] == {"alpha": 0.25, "weight_decay": 0}
    text = BASE + "train: &t\n  alpha: 7\ntune:\n  <<: *t\n  sources: [a.jsonl]\n"
    with pytest.raises(SettingsError) as error:
        read(text)
    assert [str(one).partition(": cannot")[0] for one in error.value.problems] == [
        "run.yaml, line 8: train.alpha",
        "run.yaml, line 8: tune.alpha",
    ]


def test_the_given_settings_are_handed_on_as_they_were_typed(read: Any) -> None:
    read(BASE)
    parsed = parse_run(run_file_parser("capgap run", ""), ["run.yaml", "--seeds", "[1]", "--train.alpha=0.5"])
    assert parsed.given == ["--seeds=[1]", "--train.alpha=0.5"] and parsed.flags == {}
    again = parse_run(run_file_parser("capgap run", ""), ["--config", "run.yaml", *parsed.given])
    assert again.settings == parsed.settings


def test_a_logger_that_a_flag_names_reaches_the_stages_that_read_the_resolved_file(read: Any) -> None:
    """A run file cannot name a class, and the driver hands its settings on as a file."""
    flag = ["--train.loggers", "[{class_path: mine.Logger}]"]
    run = read(BASE, *flag)
    assert run.train.loggers == ({"class_path": "mine.Logger"},)
    assert read(run.model_dump_json()).train.loggers == run.train.loggers
    with pytest.raises(SettingError, match=r"class_path: a run file cannot name a class; found other\.Logger"):
        read(run.model_dump_json().replace("mine.Logger", "other.Logger"))


def test_the_same_reader_serves_grids_and_settings_without_a_file(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    small = {"name": "g", "out": "o", "teachers": {"t": {"model": {}}}, "students": {"s": {"model": {}}}}
    grid.write_text(yaml.safe_dump(small | {"budgets": {"b": {"tokens": 5}}}, sort_keys=False))
    assert read_settings(LawGrid, grid, [("max_hours", "3"), ("train_of.s.alpha_schedule", "null")]).max_hours == 3
    with pytest.raises(SettingError, match=r"line \d+: budgets.b: found both of tokens and tokens_per_parameter"):
        read_settings(LawGrid, _with(grid, "tokens: 5", "tokens: 5\n    tokens_per_parameter: 3"))
    with pytest.raises(SettingError, match=r"--teacher_training.lr: no such setting.*teacher_training.learning_rate\?"):
        read_settings(LawGrid, grid, [("teacher_training.lr", "3")])
    parser = Parser("capgap import", "", ImportSettings)
    flags = ["--sources", '["a.parquet"]', "--out", "o", "--tokenizer", "t", "--teacher", "u", "--columns.ids", "top"]
    assert parse_settings(parser, flags, ImportSettings).settings.columns.ids == "top"
    with pytest.raises(SettingsError, match=r"--tokenizer: is missing; give --tokenizer"):
        parse_settings(parser, flags[:4], ImportSettings)


def _with(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    changed = path.with_name("changed.yaml")
    changed.write_text(text.replace(old, new))
    return changed
