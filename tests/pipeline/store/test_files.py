from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from capgap.pipeline.store.files import TEMP_MARK, atomic_file, whole_folder, write_atomically

_KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from capgap.pipeline.store.files import atomic_file
with atomic_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_killed_writers_left_goes_with_the_next_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "run.resolved.json"
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-P", "-c", _KILLED_WHILE_WRITING, str(path)], check=False)
        assert killed.returncode == -signal.SIGKILL
    assert len(_names(tmp_path)) == 2 and all(TEMP_MARK in name for name in _names(tmp_path))
    other = tmp_path / f"other.json{TEMP_MARK}0123456789ab"
    other.write_text("of another file")
    write_atomically(path, "whole")
    assert _names(tmp_path) == [other.name, path.name] and path.read_text() == "whole"


def test_what_a_writer_that_lives_is_at_stays(tmp_path: Path) -> None:
    path = tmp_path / "run.resolved.json"
    with atomic_file(path) as file:
        file.write(b"slow")
        write_atomically(path, "quick")
        assert path.read_text() == "quick" and len(_names(tmp_path)) == 2
    assert path.read_text() == "slow" and _names(tmp_path) == [path.name]


def test_many_writers_of_one_file_leave_it_whole_and_nothing_beside_it(tmp_path: Path) -> None:
    path, errors = tmp_path / "run.resolved.json", []

    def write(text: str) -> None:
        try:
            for _ in range(30):
                write_atomically(path, text)
        except OSError as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(letter * 5000,)) for letter in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert errors == [] and _names(tmp_path) == [path.name]
    assert path.read_text() in {letter * 5000 for letter in "abcd"}


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, "first")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"second")
        raise RuntimeError
    assert path.read_text() == "first" and _names(tmp_path) == ["a"]
    assert os.access(path, os.R_OK)


def test_a_folder_appears_whole_and_in_place_of_what_a_kill_left_of_it(tmp_path: Path) -> None:
    left = tmp_path / "model"
    left.mkdir()
    (left / ".tmpny05QV").write_text("the half of a library that writes under names of its own")
    with whole_folder(left) as folder:
        (folder / "config.json").write_text("whole")
        assert _names(left) == [".tmpny05QV"]
    assert _names(tmp_path) == ["model"] and _names(left) == ["config.json"]


def test_an_error_leaves_the_folder_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(OSError, match="no space left"), whole_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("half")
        raise OSError("no space left")
    assert _names(tmp_path) == ["model"] and _names(tmp_path / "model") == []
