"""The user's own tasks as data: what a folder of tasks may hold where its code is not trusted.

lm-eval runs whatever a task names: `!function` imports Python, a template can reach Python through Jinja, an unknown
metric is fetched and run, and some kinds of data are unpickled. Without `benchmarks.trust_task_code` a task may only
use data in plain files and metrics of lm-eval, and its templates are rendered in Jinja's sandbox.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

from capgap.schemas.errors import InputError

# builders of `datasets` that only parse; the one called `pandas` unpickles
_PLAIN_DATA = ("json", "csv", "parquet", "text")
_STANDARD_TAG = "tag:yaml.org,"


def task_files(folder: Path) -> list[Path]:
    """Return every file below a folder of tasks, for the manifest, because a task may read any of them."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in _below(path, folder))
    )


def require_plain_tasks(folder: Path) -> None:
    """Refuse a folder of tasks that would run code.

    Raises:
        InputError: A task names code, data that may hold code, or a metric that lm-eval does not have.
    """
    seen: set[Path] = set()
    for path in sorted(folder.rglob("*.yaml")):
        _require_plain(path.resolve(), seen)


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Keep templates of tasks from reaching Python while the block runs."""
    import lm_eval.utils

    given = lm_eval.utils.env
    sandboxed = SandboxedEnvironment(loader=given.loader, undefined=StrictUndefined, keep_trailing_newline=True)
    sandboxed.filters.update(given.filters)
    lm_eval.utils.env = sandboxed
    try:
        yield
    finally:
        lm_eval.utils.env = given


def _require_plain(path: Path, seen: set[Path]) -> None:
    if path in seen:
        return
    seen.add(path)
    try:
        text = path.read_text()
        tags = [getattr(event, "tag", None) for event in yaml.parse(text, Loader=yaml.SafeLoader)]
        strange = [tag for tag in tags if tag and not tag.startswith(_STANDARD_TAG)]
        if strange:
            raise _code(path, strange[0])
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError("the task cannot be read", where=path, found=str(error), expected="YAML") from None
    for name, value in _settings(values):
        for one in value if isinstance(value, list) else [value]:
            if name == "include":
                _require_plain((path.parent / str(one)).resolve(), seen)
            elif _may_run_code(name, one):
                raise _code(path, f"{name}: {one}")


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every setting of a task, at any depth, because a group holds tasks with settings of their own."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield str(name), inner
            yield from _settings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _settings(inner)


def _may_run_code(name: str, value: Any) -> bool:
    from lm_eval.api import metrics, registry

    # importing the metrics fills the registry
    assert metrics.mean is not None
    match name:
        case "dataset_path":
            return value not in _PLAIN_DATA
        case "metric":
            return value not in registry.metric_registry
        case "hf_evaluate":
            return bool(value)
        case "use_prompt" | "class" | "custom_dataset":
            return True
        case _:
            return False


def _code(path: Path, found: str) -> InputError:
    return InputError(
        "this task runs code, or may fetch some",
        where=path,
        found=found,
        expected=f"data of {', '.join(_PLAIN_DATA)}, metrics of lm-eval, and no !function",
        fix="set benchmarks.trust_task_code if you trust whoever wrote it",
    )


def _below(path: Path, folder: Path) -> tuple[str, ...]:
    return path.relative_to(folder).parts
