"""Loggers of a training by name: Lightning's, each in the stage's folder, each gone on with after a kill.

    train.loggers --> classes and arguments --> Lightning loggers --log_metrics--> logs/tensorboard, a tracker, ...

A resumed training takes some steps again. No logger shows them twice: TensorBoard drops what it has of them, the file
of `csv` is written anew from metrics.csv, and any other receives a step only if it did not receive it before.
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
from capgap.pipeline.train.metrics import ResumedLogger, read_rows
from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.run_optimization import LoggerSettings

_LIGHTNING = "lightning.pytorch.loggers"
_IDS_NAME = "loggers.json"


@dataclass(frozen=True)
class LogBook:
    """What loggers must know of a training.

    Attributes:
        logs: folder that receives what they write.
        work: folder that lives as long as the training is unfinished.
        metrics: the training's metrics.csv, as it was when it stopped.
        first_step: that the training begins with; above 0 it goes on from a checkpoint.
        title: of the training.
    """

    logs: Path
    work: Path
    metrics: Path
    first_step: int
    title: str


@dataclass(frozen=True)
class _Known:
    """A logger that goes by a name.

    Attributes:
        class_path: of the logger.
        package: that it needs, as Python imports it and pip installs it.
        arguments: where it writes, for a training and the id of an earlier log of it, if there is one.
        id_of: what finds its log again; None where the folder does.
    """

    class_path: str
    package: str
    arguments: Callable[[LogBook, str | None], dict[str, Any]]
    id_of: Callable[[Any], str] | None = None


def _tensorboard(book: LogBook, _: str | None) -> dict[str, Any]:
    # steps to come that earlier files hold are not shown
    again = {"purge_step": book.first_step + 1}
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
        SettingError: there is no such logger.
        InputError: it needs a package that is not installed.
    """
    for one in map(_Wanted.read, settings):
        one.find()


def make_loggers(settings: Sequence[str | dict[str, Any]], book: LogBook) -> list[ResumedLogger]:
    """The loggers, ready for the steps to come; those of a training that was killed go on in their logs.

    Raises:
        SettingError, InputError: as `require_loggers`; or a logger does not take its arguments.
    """
    ids = _remembered(book)
    loggers = []
    for number, one in enumerate(map(_Wanted.read, settings)):
        key = f"{number} {one.class_path}"
        logger = one.make(book, ids.get(key))
        if one.known is not None and one.known.class_path == _KNOWN["csv"].class_path:
            _log_again(logger, book)
            loggers.append(ResumedLogger(logger, book.first_step))
        elif one.known is not None and one.known.id_of is None:
            loggers.append(ResumedLogger(logger, book.first_step))
        else:
            steps = [int(row["step"]) for row in read_rows(book.metrics)] if key in ids else []
            loggers.append(ResumedLogger(logger, max(steps, default=0)))
            ids[key] = "" if one.known is None or one.known.id_of is None else one.known.id_of(logger)
    _remember(book, ids)
    return loggers


@dataclass(frozen=True)
class _Wanted:
    """A logger of the run file."""

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
        """The class."""
        module, _, name = self.class_path.rpartition(".")
        if self.known is not None and importlib.util.find_spec(self.known.package) is None:
            raise self._missing(self.known.package)
        try:
            found = getattr(importlib.import_module(module), name)
            # a run file names a logger, not whatever else could be called
            if isinstance(found, type) and issubclass(found, Logger):
                return found
        except ModuleNotFoundError as error:
            # a module that is missing inside of the package that is named is no such module
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
    """Its file is begun anew by every process."""
    for row in read_rows(book.metrics):
        if int(row["step"]) <= book.first_step:
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
