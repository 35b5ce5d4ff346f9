"""The loggers of a training, made from their names in the run file; a resumed training goes on in the same logs.

    train.loggers --> classes and arguments --> Lightning loggers --log_metrics--> logs/tensorboard, a tracker, ...

A resumed training takes some steps again, and no logger shows them twice: TensorBoard drops its earlier entries of
these steps, the file of `csv` is written again from metrics.csv, and any other logger receives each step only once.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.train.metrics import ResumedLogger, last_kept_step, read_rows
from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.run_optimization import LoggerSettings

_LIGHTNING = "lightning.pytorch.loggers"
_IDS_NAME = "loggers.json"


@dataclass(frozen=True)
class LogBook:
    """The facts about a training from which its loggers are made.

    Attributes:
        logs: The folder into which loggers write.
        work: The folder that exists as long as the training is unfinished.
        metrics: The training's metrics.csv, as an earlier process left it.
        first_step: The step after which this process begins; above 0 the training resumes from a checkpoint.
        title: The title of the training.
    """

    logs: Path
    work: Path
    metrics: Path
    first_step: int
    title: str

    @property
    def last_step(self) -> int:
        """The last step of the earlier process that stays in the logs; -1 where the training begins anew."""
        return last_kept_step(self.first_step)


@dataclass(frozen=True)
class _Known:
    """A logger that the run file can name by one word.

    Attributes:
        class_path: The import path of the logger's class.
        package: The package that the logger needs; its import name is also its name for pip.
        arguments: Returns the arguments of the class, from a training and the id of its earlier log if there is one.
        id_of: Returns the id by which a log is found again; None where the log is found by its folder.
    """

    class_path: str
    package: str
    arguments: Callable[[LogBook, str | None], dict[str, Any]]
    id_of: Callable[[Any], str] | None = None


def _tensorboard(book: LogBook, _: str | None) -> dict[str, Any]:
    # TensorBoard then ignores later steps in the files of an earlier process.
    again = {"purge_step": book.last_step + 1}
    return {"save_dir": str(book.logs), "name": "tensorboard", "version": "", "default_hp_metric": False, **again}


def _csv(book: LogBook, _: str | None) -> dict[str, Any]:
    return {"save_dir": str(book.logs), "name": "csv", "version": "", "flush_logs_every_n_steps": 1}


def _wandb(book: LogBook, run_id: str | None) -> dict[str, Any]:
    project = os.environ.get("WANDB_PROJECT", "capgap")
    place = {"save_dir": str(book.logs), "project": project, "name": book.title}
    return place | {"id": run_id or uuid.uuid4().hex[:16]}


def _mlflow(book: LogBook, run_id: str | None) -> dict[str, Any]:
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "capgap")
    place = {"save_dir": str(book.logs / "mlflow"), "experiment_name": experiment, "run_name": book.title}
    return place | {"run_id": run_id}


_KNOWN = {
    "tensorboard": _Known(f"{_LIGHTNING}.TensorBoardLogger", "tensorboard", _tensorboard),
    "csv": _Known(f"{_LIGHTNING}.CSVLogger", "lightning", _csv),
    "wandb": _Known(f"{_LIGHTNING}.WandbLogger", "wandb", _wandb, lambda logger: str(logger.version)),
    "mlflow": _Known(f"{_LIGHTNING}.MLFlowLogger", "mlflow", _mlflow, lambda logger: str(logger.run_id)),
}


def require_loggers(settings: Sequence[str | dict[str, Any]]) -> None:
    """Refuse a logger that does not exist, or whose package is missing.

    Raises:
        SettingError: A logger does not exist.
        InputError: A logger needs a package that is not installed.
    """
    for one in map(_Wanted.read, settings):
        one.find()


def make_loggers(settings: Sequence[str | dict[str, Any]], book: LogBook) -> list[ResumedLogger]:
    """Make the loggers of a training; those of a training that was killed go on in their earlier logs.

    Raises:
        SettingError: A logger does not exist, or does not take its arguments.
        InputError: A logger needs a package that is not installed.
    """
    ids = _remembered(book)
    loggers = []
    for number, one in enumerate(map(_Wanted.read, settings)):
        key = f"{number} {one.class_path}"
        logger = one.make(book, ids.get(key))
        if one.known is not None and one.known.class_path == _KNOWN["csv"].class_path:
            _log_again(logger, book)
            loggers.append(ResumedLogger(logger, book.last_step))
        elif one.known is not None and one.known.id_of is None:
            loggers.append(ResumedLogger(logger, book.last_step))
        else:
            steps = [int(row["step"]) for row in read_rows(book.metrics)] if key in ids else []
            loggers.append(ResumedLogger(logger, max(steps, default=-1)))
            ids[key] = "" if one.known is None or one.known.id_of is None else one.known.id_of(logger)
    _remember(book, ids)
    return loggers


@dataclass(frozen=True)
class _Wanted:
    """A logger that the run file asks for; `known` is set if it can be named by one word."""

    name: str
    class_path: str
    arguments: dict[str, Any]
    known: _Known | None

    @classmethod
    def read(cls, given: str | dict[str, Any]) -> _Wanted:
        settings = LoggerSettings.read(given)
        name, arguments = settings.class_path, settings.init_args
        known = _KNOWN.get(name) or next((one for one in _KNOWN.values() if one.class_path == name), None)
        return cls(name, known.class_path if known else name, dict(arguments), known)

    def find(self) -> Any:
        """Import the logger's class and return it."""
        module, _, name = self.class_path.rpartition(".")
        if self.known is not None and importlib.util.find_spec(self.known.package) is None:
            raise self._missing(self.known.package)
        try:
            found = getattr(importlib.import_module(module), name)
            # A run file may name loggers only, not any other callable.
            if isinstance(found, type) and issubclass(found, Logger):
                return found
        except ModuleNotFoundError as error:
            # If the missing module is inside the named package, the class path is wrong; else a package is missing.
            if error.name is not None and ("." not in error.name or not module.startswith(error.name)):
                raise self._missing(error.name) from None
        except (AttributeError, ValueError):
            pass
        raise SettingError(
            "no such logger",
            where="train.loggers",
            found=self.name,
            expected=f"one of {', '.join(_KNOWN)}, or the path of a class, as in {_LIGHTNING}.CometLogger",
        )

    def make(self, book: LogBook, run_id: str | None) -> Any:
        arguments = self.arguments if self.known is None else self.known.arguments(book, run_id) | self.arguments
        try:
            return self.find()(**arguments)
        except ImportError as error:
            raise self._missing(error.name or str(error)) from None
        except (TypeError, ValueError) as error:
            raise SettingError(
                "the logger does not take its arguments",
                where=f"train.loggers: {self.name}",
                found=str(error),
                expected=f"the arguments of {self.class_path}",
            ) from None

    def _missing(self, package: str) -> InputError:
        package = " ".join(package.split())
        is_name = package.replace("_", "").replace(".", "").isalnum()
        return InputError(
            "the logger's package is not installed",
            where=f"train.loggers: {self.name}",
            found=f"no {package}" if is_name else package,
            fix=f"pip install {package}, or take the logger out" if is_name else "install it, or take the logger out",
        )


def _log_again(logger: Any, book: LogBook) -> None:
    """Log the rows of metrics.csv again, because the logger begins its file anew in every process."""
    for row in read_rows(book.metrics):
        if int(row["step"]) <= book.last_step:
            values = {name: float(value) for name, value in row.items() if value and name != "step"}
            logger.log_metrics(values, step=int(row["step"]))


def _remembered(book: LogBook) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads((book.work / _IDS_NAME).read_bytes())
    except FileNotFoundError:
        return {}
    return found


@rank_zero_only
def _remember(book: LogBook, ids: dict[str, str]) -> None:
    write_atomically(book.work / _IDS_NAME, json.dumps(ids))
