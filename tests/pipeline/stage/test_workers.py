"""Errors of worker processes are raised in the process that started them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from capgap.pipeline.stage.workers import run_in_processes
from capgap.schemas.errors import InputError

# a module of its own, because a worker imports what it is to call
PROGRAM = """
import threading

from capgap.schemas.errors import InputError


class HoldsALockError(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class TakesTwoError(Exception):
    def __init__(self, text, place):
        super().__init__(f"{text} at {place}")


def fail(kind):
    if kind == "cannot be pickled":
        raise HoldsALockError("the file is odd")
    if kind == "cannot be made again":
        raise TakesTwoError("the file is odd", 7)
    raise InputError("the file is odd", where="a.txt", found="nothing")
"""


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("cannot be pickled", RuntimeError, "^HoldsALockError: the file is odd$"),
        ("cannot be made again", RuntimeError, "^TakesTwoError: the file is odd at 7$"),
        ("can be sent", InputError, "^a.txt: the file is odd; found nothing$"),
    ],
)
def test_an_error_arrives_whether_or_not_it_can_be_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: type[Exception], said: str
) -> None:
    (tmp_path / "program_of_workers.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    program = importlib.import_module("program_of_workers")
    with pytest.raises(error, match=said):
        run_in_processes(program.fail, (kind,), 1, lambda: None, "corpus.workers")
