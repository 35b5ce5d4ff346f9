"""Loggers by name: what they are told, across kills too, and what is said where one cannot be had."""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_tasks import tiny_task

from capgap.jobs.arguments import parse_run, run_file_parser
from capgap.pipeline.train import fit as fit_module
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.loggers import LogBook, make_loggers, require_loggers
from capgap.pipeline.train.metrics import read_rows
from capgap.pipeline.train.task import TrainingTask
from capgap.schemas.errors import CapgapError, InputError, SettingError


class Tracker(Logger):
    """Remembers all that it was ever told, as a service on the net would."""

    told: list[tuple[int, str]] = []  # noqa: RUF012  # of all of them, on purpose
    statuses: list[str] = []  # noqa: RUF012

    def __init__(self, project: str = "none") -> None:
        super().__init__()
        self.project = project

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.told.extend((step, name) for name in metrics)

    def log_hyperparams(self, params: Any) -> None:
        self.parameters = params

    def finalize(self, status: str) -> None:
        self.statuses.append(status)


TRACKER = f"{__name__}.Tracker"


@pytest.fixture(autouse=True)
def _tracker() -> None:
    # pytest imports this file by its path; here it can be named
    sys.modules[__name__] = sys.modules.get(__name__) or sys.modules[Tracker.__module__]
    Tracker.told.clear()
    Tracker.statuses.clear()


@pytest.fixture
def make_task(make_shards, tmp_path) -> Callable[..., TrainingTask]:
    def make(*loggers: Any, folder: str = "stage") -> TrainingTask:
        settings = {
            "batch_sequences": 2,
            "log_every_steps": 2,
            "checkpoint_every_steps": 3,
            "validate_every_steps": 6,
            "loggers": loggers,
        }
        (tmp_path / folder).mkdir(exist_ok=True)
        training = make_shards(tmp_path / "shards", "sampled", 24)
        return tiny_task(tmp_path / folder, training, make_shards(tmp_path / "heldout", None, 6, seed=1), settings)

    return make


class KilledError(RuntimeError):
    """Of a process that stops at once."""


@pytest.fixture
def killed_after(monkeypatch) -> Callable[[int | None], None]:
    """Lets the next training stop behind that step, with nothing but what is on disk left of it."""
    trainer = lightning.Trainer

    class Kill(lightning.Callback):
        def __init__(self, step: int) -> None:
            self._step = step

        def on_train_batch_end(self, trainer: Any, *unused: Any) -> None:
            if trainer.global_step == self._step:
                raise KilledError

    def arm(step: int | None) -> None:
        more = [] if step is None else [Kill(step)]

        def made(**given: Any) -> lightning.Trainer:
            return trainer(**given | {"callbacks": [*given["callbacks"], *more]})

        monkeypatch.setattr(lightning, "Trainer", made)

    return arm


def _scalars(folder: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _train_and_kill(task: TrainingTask, make_student, killed_after) -> None:
    for step in (2, 7, 11, None):  # before the first checkpoint, and behind others, one of them between two rows
        killed_after(step)
        if step is None:
            fit(make_student(), task)
        else:
            with pytest.raises(KilledError):
                fit(make_student(), task)


def test_a_killed_training_goes_on_in_its_logs_without_double_rows(make_task, make_student, killed_after) -> None:
    task = make_task("tensorboard", "csv", TRACKER)
    _train_and_kill(task, make_student, killed_after)
    logs, steps = task.folder / "logs", [2, 4, 6, 8, 10, 12]
    found = _scalars(logs / "tensorboard")
    assert found["train_loss"] == found["gradient_norm"] == steps
    assert found["validation_loss"] == [6, 12]
    with (logs / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train_loss"]] == steps
    assert [int(row["step"]) for row in rows if row["validation_loss"]] == [6, 12]
    ours = {(row["step"], row["train_loss"]) for row in read_rows(task.folder / "metrics.csv")}
    assert {(row["step"], row["train_loss"]) for row in rows} == ours
    assert [step for step, name in Tracker.told if name == "train_loss"] == steps
    assert [step for step, name in Tracker.told if name == "validation_loss"] == [6, 12]
    assert Tracker.statuses == ["failed", "failed", "failed", "success"]
    undisturbed = make_task(folder="undisturbed")
    killed_after(None)
    fit(make_student(), undisturbed)
    assert ours == {(row["step"], row["train_loss"]) for row in read_rows(undisturbed.folder / "metrics.csv")}


def test_the_measurement_before_the_first_step_is_logged_once_by_every_logger_and_across_kills(
    make_task, make_shards, make_student, killed_after, tmp_path
) -> None:
    task = make_task("tensorboard", "csv", TRACKER)
    scored = make_shards(tmp_path / "scored", "sampled", 6, seed=1)
    task = dataclasses.replace(task, heldout_targets=scored)
    _train_and_kill(task, make_student, killed_after)
    assert [int(row["step"]) for row in read_rows(task.folder / "metrics.csv") if row["validation_loss"]] == [0, 6, 12]
    assert _scalars(task.folder / "logs" / "tensorboard")["validation_loss"] == [0, 6, 12]
    rows = read_rows(task.folder / "logs" / "csv" / "metrics.csv")
    assert [int(row["step"]) for row in rows if row["validation_loss"]] == [0, 6, 12]
    assert [step for step, name in Tracker.told if name == "validation_loss"] == [0, 6, 12]


def test_a_tracker_is_told_what_the_training_is_once(make_task, make_student) -> None:
    loggers: list[Any] = []
    original = fit_module.make_loggers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "make_loggers", lambda *given: loggers.extend(original(*given)) or loggers)
        fit(make_student(), make_task({"class_path": TRACKER, "init_args": {"project": "mine"}}))
    (told,) = loggers
    assert told.logger.name == "mine"
    assert told.logger.parameters["learning_rate"] == 3e-3 and told.logger.parameters["alpha"] == 1.0
    assert "loggers" not in told.logger.parameters


def test_no_loggers_leave_metrics_csv_alone(make_task, make_student) -> None:
    task = make_task()
    fit(make_student(), task)
    assert not (task.folder / "logs").exists()
    assert len(read_rows(task.folder / "metrics.csv")) == 8


def _book(folder: Path, first_step: int = 0) -> LogBook:
    (folder / "work").mkdir(exist_ok=True)
    return LogBook(folder / "logs", folder / "work", folder / "metrics.csv", first_step, "a title")


def test_arguments_are_laid_over_those_of_a_name(tmp_path) -> None:
    for name in ("tensorboard", "lightning.pytorch.loggers.TensorBoardLogger"):
        given = {"class_path": name, "init_args": {"save_dir": str(tmp_path / "mine"), "prefix": "p"}}
        (told,) = make_loggers([given], _book(tmp_path, 4))
        assert isinstance(told.logger, TensorBoardLogger)
        assert told.logger.log_dir == str(tmp_path / "mine" / "tensorboard") + "/"
        assert (told.logger._prefix, told.logger._kwargs, told.last_step) == ("p", {"purge_step": 5}, 4)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ("tensorbord", SettingError, "train.loggers: no such logger; found tensorbord, expected one of tensorboard,"),
        ("lightning.pytorch.loggers.None_", SettingError, "loggers: no such logger; found lightning.pytorch.loggers.N"),
        ("lightning.nowhere.Logger", SettingError, "train.loggers: no such logger; found lightning.nowhere.Logger"),
        ("nowhere.Logger", InputError, "loggers: nowhere.Logger: the logger's package is not installed; found no nowh"),
        (
            {"class_path": "csv", "init_args": {"colour": "red"}},
            SettingError,
            "train.loggers: csv: the logger does not take its arguments; found .*'colour', expected the arguments of",
        ),
    ],
)
def test_a_logger_that_cannot_be_had_is_one_line(tmp_path, given: Any, kind: type[CapgapError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        make_loggers([given], _book(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_logger_whose_package_is_missing_says_what_to_install(monkeypatch, name: str) -> None:
    original = fit_module.make_loggers.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None if package == name else original(package))
    with pytest.raises(InputError, match=f"{name}: the logger's package is not installed; found no {name}; pip inst"):
        require_loggers([name])


def test_loggers_are_a_setting_like_any_other(tmp_path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        "{name: a, out: o, reuse: {cache: c}, teacher: {path: t}, student: {path: s}, "
        "train: {loggers: [csv, tensorboard]}}"
    )
    parsed, *_ = parse_run(run_file_parser("capgap", ""), [str(run)])
    assert parsed.train.loggers == ("csv", "tensorboard")
    flag = "[tensorboard, {class_path: wandb, init_args: {project: mine, offline: true}}]"
    parsed, *_ = parse_run(run_file_parser("capgap", ""), [str(run), "--train.loggers", flag])
    assert parsed.train.loggers == (
        "tensorboard",
        {"class_path": "wandb", "init_args": {"project": "mine", "offline": True}},
    )
    assert parse_run(run_file_parser("capgap", ""), [str(run), "--train.loggers", "[]"])[0].train.loggers == ()
    run.write_text(run.read_text().replace("csv", "{class: csv}"))
    with pytest.raises(SettingError, match=r"train.loggers.*class"):
        parse_run(run_file_parser("capgap", ""), [str(run)])
