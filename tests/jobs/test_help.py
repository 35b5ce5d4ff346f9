"""Help: a command on one screen, the settings of a section, all of them; in the words of the schemas."""

from __future__ import annotations

import re

import pytest

from capgap.jobs.cli import main
from capgap.jobs.help import COMMON, help_text
from capgap.jobs.registry import COMMANDS, stage_names
from capgap.jobs.settings import all_settings, find
from capgap.schemas.interchange import ImportSettings
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.run_file import RunFile

_NO_WORDS_OF_PYTHON = re.compile(r"typing\.|<class|NoneType|\bLiteral\b|Optional\[|Union\[|capgap\.schemas|0x")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    overview = said(capsys, "--help")
    assert said(capsys) == overview == said(capsys, "help")
    for name, command in COMMANDS.items():
        assert f"  {name:<12}{command.help}\n" in overview
    assert max(map(len, overview.splitlines())) <= 100


def test_every_stage_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "--help").partition("One stage of the run file:")[2].splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(stage_names())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_s_help_is_one_screen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, *name.split(), "--help")
    lines = text.splitlines()
    assert lines[0].startswith(f"usage: capgap {name}")
    assert len(lines) <= 42 and max(map(len, lines)) <= 100
    assert not _NO_WORDS_OF_PYTHON.search(text)
    parser = COMMANDS[name].parser()
    for action in parser.own_flags:
        assert all(f"  {flag}" in text for flag in action.option_strings)
    if parser.record is not None:
        assert text.count("\n  --") == len(parser.own_flags) + 1 + 10, "ten settings"


def test_help_may_stand_before_the_command_and_behind_the_run_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "help", "train") == said(capsys, "train", "--help") == said(capsys, "train", "x.yaml", "-h")


def test_a_stage_s_help_begins_with_its_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "cache", "--help")
    assert "--slice" in text and text.index("--cache.recording") < text.index("--out")
    assert "--slice" not in said(capsys, "train", "--help")


def test_the_commonest_settings_exist() -> None:
    for names in COMMON.values():
        for name in names:
            loc = tuple(name.split("."))
            assert any(find(record, loc) for record in (RunFile, LawGrid, ImportSettings)), name


@pytest.mark.parametrize("section", ["cache", "teacher.training", "tune", "judge"])
def test_help_of_a_section_has_each_setting_with_what_it_takes_its_default_and_its_sentence(
    section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, "run", "--help", section)
    record = find(RunFile, tuple(section.split(".")))
    assert record is not None and record.section is not None
    plain = "".join(text.split())
    for setting in all_settings(record.section, record.loc):
        assert f"  --{setting.name}  (" in text
        assert "".join(setting.sentences.split()) in plain
    assert "--out " not in text and not _NO_WORDS_OF_PYTHON.search(text)


def test_help_of_a_section_says_kinds_and_defaults_in_plain_words(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "run", "--help", "cache")
    assert "--cache.recording  (one of sampled, topk, both; default sampled)" in text
    assert "--cache.num_samples  (integer, at least 1, at most 65535)" in text
    assert "--cache.extra_temperatures  (list of numbers; default [])" in text
    assert "--train.compile  (true or false; default false)" in said(capsys, "run", "--help", "train")
    assert "--train.alpha" in said(capsys, "run", "--help", "train.alpha")


def test_help_of_all_has_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "status", "--help", "all")
    for setting in all_settings(RunFile):
        assert f"--{setting.name} " in text or f"\n{setting.name}: " in text
    assert "Peak learning rate." in text and not _NO_WORDS_OF_PYTHON.search(text)
    assert "--teachers" in said(capsys, "law", "plan", "--help", "all")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "--help", "cach"], "--help cach: no such section or setting; did you mean --help cache?"),
        (["run", "--help", "lr"], "--help lr: no such section or setting; did you mean --help train.learning_rate?"),
        (["verify", "--help", "train"], "capgap verify: has no settings; found --help train, expected --help alone"),
    ],
)
def test_help_of_nothing_is_refused(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"capgap: {line}\n"


def test_every_command_has_a_screen_that_is_made_without_running_it() -> None:
    for command in COMMANDS.values():
        assert help_text(command.parser()).startswith("usage: ")
