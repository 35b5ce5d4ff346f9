"""Did you mean ...? By spelling and by meaning: settings, flags and commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from capgap.jobs import synonyms
from capgap.jobs.cli import main
from capgap.jobs.registry import COMMANDS, first_words
from capgap.jobs.settings import find
from capgap.jobs.suggest import command_like, settings_like
from capgap.schemas.run_file import RunFile


def test_every_synonym_stands_for_what_there_is() -> None:
    for meant in synonyms.SETTINGS.values():
        assert all(find(RunFile, tuple(name.split("."))) for name in meant), meant
    for name, command in synonyms.COMMANDS.items():
        assert name not in first_words(), name
        assert command in COMMANDS or command.partition(" -")[0] in COMMANDS, command


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lr", ["train.learning_rate"]),
        ("learning-rate", ["train.learning_rate"]),
        ("train.lr", ["train.learning_rate"]),
        ("teacher.training.lr", ["teacher.training.learning_rate"]),
        ("tune.lr", ["tune.learning_rate"]),
        ("k", ["cache.top_k"]),
        ("top_k", ["cache.top_k"]),
        ("cache.k", ["cache.top_k"]),
        ("batch_size", ["train.batch_sequences"]),
        ("epochs", ["train.num_epochs"]),
        ("temp", ["cache.temperature", "train.temperature"]),
        ("draws", ["cache.num_samples"]),
        ("num_draws", ["cache.num_samples"]),
        ("cache.num_draws", ["cache.num_samples"]),
        ("context_length", ["corpus.seq_len"]),
        ("max_length", ["corpus.seq_len"]),
        ("model_name", ["teacher.path", "student.path"]),
        ("teacher_model", ["teacher.path"]),
        ("dataset", ["corpus.sources"]),
        ("gpus", ["train.num_devices", "cache.tensor_parallel", "cache.replicas"]),
        ("tp", ["cache.tensor_parallel"]),
        ("train.learning-rate", ["train.learning_rate"]),
        ("train.learning_rat", ["train.learning_rate"]),
        ("trian.alpha", ["train.alpha"]),
        ("Train.Alpha", ["train.alpha"]),
        ("teachr", ["teacher"]),
        ("studnet.prune.num_layer", ["student.prune.num_layers"]),
        ("arms.distilled.lr", ["arms.distilled.learning_rate"]),
        ("zzzz", []),
    ],
)
def test_a_setting_is_found_by_spelling_and_by_meaning(name: str, meant: list[str]) -> None:
    assert settings_like(RunFile, tuple(name.split("."))) == meant


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("distill", "run"),
        ("score", "cache"),
        ("list", "ls"),
        ("statsu", "status"),
        ("qqqq", None),
    ],
)
def test_a_command_is_found_by_spelling_and_by_meaning(name: str, meant: str | None) -> None:
    assert command_like(name, first_words()) == meant


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["distill", "demo"], "no such command; found distill; did you mean capgap run?"),
        (["qqqq"], "no such command; found qqqq; `capgap --help` lists the commands"),
        (["demo"], "no command is named; found demo; did you mean capgap run demo?"),
        (["run", "demoo"], "demoo: no such run file; did you mean demo, which is shipped?"),
        (["run", "demo", "--lr", "3"], "--lr: no such setting; found 3; did you mean --train.learning_rate?"),
        (["run", "demo", "--lr"], "--lr: no such setting; did you mean --train.learning_rate?"),
        (["status", "demo", "--wacth"], "--wacth: no such setting; did you mean --watch?"),
        (
            ["run", "demo", "train.learning_rate=1e-3"],
            "train.learning_rate=1e-3: no such file; did you mean --train.learning_rate=1e-3?",
        ),
        (
            ["run", "demo", "--train.alpha"],
            "--train.alpha: has no value; expected one: number, at least 0, at most 1; write --train.alpha VALUE",
        ),
        (["verify", "--quarantin", "x"], "--quarantin: no such flag; did you mean --quarantine?"),
        (
            ["run", "demo", "--train.lr", "3"],
            "--train.lr: no such setting; found 3; did you mean --train.learning_rate?",
        ),
        (["run", "demo", "learning-rate", "3"], "learning-rate: no such file; did you mean --train.learning_rate 3?"),
        (["run", "demo", "+train.lr=3"], "+train.lr=3: no such file; did you mean --train.learning_rate=3?"),
        (["run", "demo", "train/lr=3"], "train/lr=3: no such file; did you mean --train.learning_rate=3?"),
        (["run", "demo", "-lr", "3"], "-lr: no such flag; did you mean --train.learning_rate 3?"),
        (
            ["run", "demo", "--set", "train.lr=1e-3"],
            "--set train.lr=1e-3: no such flag; did you mean --train.learning_rate=1e-3?",
        ),
        (["run", "demo", "runs/lr"], "two files are named; found demo and runs/lr, expected one"),
        (["run", "demo", "learning-rate=3"], "learning-rate=3: no such file; did you mean --train.learning_rate=3?"),
        (["run", "lr=3", "demo"], "lr=3: no such file; did you mean --train.learning_rate=3?"),
        (
            ["run"],
            "capgap run: no run file is named; expected capgap run RUN [flags] [--SETTING VALUE ...]; `capgap ls` "
            "lists the shipped ones, and `capgap init` writes one",
        ),
        (
            ["verify"],
            "the following arguments are required: folders; expected capgap verify folders ... [flags]; see "
            "capgap verify --help",
        ),
        (["run", "--lr", "3"], "--lr: no such setting; did you mean --train.learning_rate?"),
    ],
)
def test_a_slip_is_refused_with_what_was_meant(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"capgap: {line}\n"
