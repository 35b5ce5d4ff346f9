"""Freed memory stays mapped, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from capgap.pipeline.store import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def decode():
    # together more than twice the largest, which is what glibc by itself comes to keep
    arrays = [np.ones(2_000_000, np.uint8) for _ in range(40)]
    while arrays:
        arrays.pop()

decode()
before = faults()
for _ in range(10):
    decode()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_pages_of_dropped_arrays_are_used_again() -> None:
    found = {
        how: int(subprocess.run([sys.executable, "-c", CODE, how], check=True, capture_output=True).stdout)
        for how in ("kept", "left alone")
    }
    # 10 times 80 MB are 195,000 pages of 4 kB; what else the loop touches is a handful
    assert found["kept"] < 1000 < 100_000 < found["left alone"]
