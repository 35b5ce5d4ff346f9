"""The command before any command."""

from __future__ import annotations

import subprocess
import sys


def test_torch_is_not_imported_before_its_threads_are_told_how_to_wait() -> None:
    code = "import sys, capgap.jobs.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True).stdout == b"False\n"
