"""Streams that are closed are nobody's, and no file gets their place."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CHECK = """
import os, sys
from capgap.jobs.cli import main
code = main(sys.argv[1:])
with open(os.devnull) as file:
    os._exit(code if file.fileno() > 2 else 99)
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["run", "no-such-file"], 2)])
def test_a_closed_stream_changes_no_exit_code_and_its_number_is_no_file_s(
    closed: str, words: list[str], code: int
) -> None:
    shell = ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-P", "-c", _CHECK, *words]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
