from __future__ import annotations

import subprocess
import sys

# torch keeps the program's module to the very end, when those that the pool needs are gone
ENDS = """
import torch

from capgap.pipeline.store.prefetch import prefetch

held = prefetch(range(100), lambda number: number, num_threads=2, ahead=4)
assert next(held) == 0
"""


def test_a_program_that_ends_with_an_open_iterator_says_nothing() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=600, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
