from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from capgap.pipeline.store.locks import ProcessLock
from capgap.schemas.errors import MachineError

_HOLDER = """
import sys, time
from pathlib import Path
from capgap.pipeline.store.locks import ProcessLock
lock = ProcessLock(Path(sys.argv[1]))
print(getattr(lock, sys.argv[2])(), flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize(
    ("held", "asked", "had"),
    [
        ("shared", "shared", True),
        ("shared", "exclusive", False),
        ("exclusive", "shared", False),
        ("exclusive", "exclusive", False),
    ],
)
def test_readers_share_and_nothing_else_goes_together_until_the_holder_is_killed(
    tmp_path: Path, held: str, asked: str, had: bool
) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(path), held], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "True\n"
        with ProcessLock(path) as lock:
            assert getattr(lock, asked)() is had
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with ProcessLock(path) as lock:
        assert lock.exclusive()


def test_a_lock_can_be_made_shared_and_exclusive_again(tmp_path: Path) -> None:
    with ProcessLock(tmp_path / "lock") as first, ProcessLock(tmp_path / "lock") as second:
        assert first.exclusive() and not second.shared()
        assert first.shared() and second.shared() and not first.exclusive()


def test_a_lock_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ProcessLock(tmp_path / "gone" / "lock")


def test_a_link_in_a_lock_s_place_is_not_followed(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("kept")
    theirs.chmod(0o600)
    (tmp_path / "lock").symlink_to(theirs)
    with pytest.raises(MachineError, match="lock: a link stands where a lock belongs"):
        ProcessLock(tmp_path / "lock", 0o666)
    assert (theirs.read_text(), theirs.stat().st_mode & 0o777) == ("kept", 0o600)


def test_a_lock_of_a_given_mode_has_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        ProcessLock(tmp_path / "lock", 0o666).close()
    finally:
        os.umask(before)
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o666
