"""lm-eval's tasks: found by name, refused early where they cannot be run, and loaded with their data."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from capgap.pipeline.benchmark.own_tasks import require_plain_tasks
from capgap.pipeline.benchmark.presets import PRESETS, SUITES, Asked, asked_tasks
from capgap.pipeline.store.extras import adding
from capgap.schemas.errors import CapgapError, InputError, MachineError, SettingError
from capgap.schemas.run_benchmark import BenchmarkSettings

_FEWSHOT_SEED = 1234
"""lm-eval's own seed, which decides with the task and the question's number which examples are shown."""


def require_lm_eval() -> None:
    """Raise MachineError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MachineError(
            "lm-eval is not installed",
            where="benchmarks",
            fix=f"run `make venv` in a clone, or {adding('eval')}",
        )
    # silenced, because lm-eval logs for every task which of its settings were overridden
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def check_tasks(settings: BenchmarkSettings) -> tuple[Asked, ...]:
    """Return the tasks that are asked for, after checks that all of them can be run.

    Raises:
        SettingError: A task does not exist or is asked for twice, runs programs without permission, or takes no
            examples and is given some; or a preset of several tasks is given a task's settings.
        InputError: A folder of tasks is missing, or would run code.
        MachineError: lm-eval is not installed.
    """
    require_lm_eval()
    if settings.include_path is not None:
        folder = Path(settings.include_path)
        if not folder.is_dir():
            raise InputError(
                "there is no such folder", where="benchmarks.include_path", found=folder, expected="a folder of tasks"
            )
        if not settings.trust_task_code:
            require_plain_tasks(folder)
    asked = asked_tasks(settings.tasks)
    index = task_manager(settings).task_index
    for one in asked:
        where = f"benchmarks.tasks.{one.name}"
        if one.task not in index:
            near = difflib.get_close_matches(one.task, dict.fromkeys([*SUITES, *PRESETS, *index]), n=3)
            fix = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists those of lm-eval"
            raise SettingError("no such task", where="benchmarks.tasks", found=one.task, fix=fix)
        for name, task in _leaves(index, one.task):
            _check(where, name, task, one, settings)
    return asked


def task_manager(settings: BenchmarkSettings) -> Any:
    """Return lm-eval's TaskManager over its own tasks and those of `include_path`."""
    if settings.include_path is not None:
        # lm-eval's fourteen thousand tasks are left out where none is asked for, which saves seconds
        own = _manager(settings.include_path, False)
        names = [one.task for one in asked_tasks(settings.tasks)]
        if all(name in own.task_index and not _missing(own.task_index, name) for name in names):
            return own
    return _manager(settings.include_path, True)


@lru_cache(maxsize=4)
def _manager(include_path: str | None, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def load_task(settings: BenchmarkSettings, asked: Asked) -> dict[str, Any]:
    """Return the task, or all tasks of the group, with their data and the examples that they show, for `evaluate`.

    Raises:
        InputError: The data are not on this machine and cannot be fetched, or the task cannot be built.
    """
    import datasets

    datasets.disable_progress_bars()
    manager = task_manager(settings)
    where = f"benchmarks.tasks.{asked.name}"
    entry = manager.task_index[asked.task]
    own = settings.include_path is not None and _is_below(entry.yaml_path, Path(settings.include_path))
    try:
        with contextlib.chdir(entry.yaml_path.parent) if own else contextlib.nullcontext():
            loaded: dict[str, Any] = manager.load([asked.task])
    except CapgapError:
        raise
    except Exception as error:  # raised by datasets, by the hub, or by code of the task
        raise InputError(
            f"the task {asked.task} cannot be loaded",
            where=where,
            found=_said(error),
            expected="its data, on this machine or from the network",
            fix="mend the task, or the path of its data"
            if own
            else "run this stage once where there is a network, and carry HF_HOME over to where there is none",
        ) from None
    for task in loaded["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if asked.num_fewshot is not None and fixed != 0:
            task.set_config(key="num_fewshot", value=asked.num_fewshot)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def seed_examples(loaded: Mapping[str, Any]) -> None:
    """Fix the seed of the tasks' examples, so that every model is shown the same ones."""
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _check(where: str, name: str, task: Mapping[str, Any], asked: Asked, settings: BenchmarkSettings) -> None:
    if task.get("unsafe_code") and not settings.allow_code_execution:
        raise SettingError(
            f"the task {name} runs programs that the model writes, on this machine",
            where=where,
            fix="set benchmarks.allow_code_execution, in a container or as a user that may do no harm",
        )
    if task.get("num_fewshot") == 0 and asked.num_fewshot:
        raise SettingError(
            f"the task {name} is asked without solved examples",
            where=f"{where}.num_fewshot",
            found=asked.num_fewshot,
            expected=0,
        )


def _leaves(index: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every task behind the name of a task, group or tag, with the settings in its file."""
    entry = index[name]
    if entry.kind.name == "TAG":
        children: list[Any] = sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        given = entry.cfg["task"]
        children = given if isinstance(given, list) else [given]
    else:
        yield name, entry.cfg
        return
    for child in children:
        inner = child if isinstance(child, str) else child.get("task") or child.get("group")
        if isinstance(inner, str) and inner in index:
            own = {} if isinstance(child, str) else child
            yield from ((leaf, {**settings, **own}) for leaf, settings in _leaves(index, inner))
        elif not isinstance(child, str):
            yield str(inner), child
        else:
            yield child, {"missing": True}


def _missing(index: Mapping[str, Any], name: str) -> bool:
    return any("missing" in task for _, task in _leaves(index, name))


def _is_below(path: Path | None, folder: Path) -> bool:
    return path is not None and path.resolve().is_relative_to(folder.resolve())


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
