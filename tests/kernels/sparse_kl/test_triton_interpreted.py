"""test_triton_rows.py and its Triton kernel on a CPU, in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from capgap.kernels.sparse_kl.backends import kernel_for
from capgap.kernels.sparse_kl.rows import Backend

pytest.importorskip("triton", reason="Triton is not installed")

_TESTS = Path(__file__).with_name("test_triton_rows.py")


def test_every_test_of_the_kernel_passes_in_the_interpreter() -> None:
    # in a process of its own: how a kernel runs is settled when its module is imported
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(_TESTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    # one takes a GPU
    found = re.search(r"(\d+) passed, 1 skipped", done.stdout)
    assert found and int(found[1]) >= 120, done.stdout[-2000:]


@pytest.mark.parametrize(
    ("dtype", "why"),
    [
        ("float32", "the Triton kernel runs on a GPU, and under TRITON_INTERPRET=1 on a CPU"),
        ("float64", "the Triton kernel is for float16, bfloat16 and float32"),
    ],
)
def test_asked_for_where_it_does_not_run_the_kernel_says_why(dtype: str, why: str) -> None:
    backend: Backend = "triton"
    with pytest.raises(
        ValueError, match=f"backend: got 'triton' on cpu in torch.{dtype}, expected auto or torch; {why}"
    ):
        kernel_for(backend, torch.device("cpu"), getattr(torch, dtype))


def test_on_a_cpu_triton_is_not_even_imported() -> None:
    program = (
        "import sys, torch\n"
        "from capgap.kernels.sparse_kl.backends import kernel_for\n"
        "kernel_for('auto', torch.device('cpu'), torch.float32)\n"
        "sys.exit('capgap.kernels.sparse_kl.triton_rows' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=1800).returncode == 0
