"""Every script of benchmarks/ starts as it says: from a clean shell, in any folder, with `-P` or without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))
COMMANDS = [script for script in SCRIPTS if '__name__ == "__main__"' in script.read_text()]

# As `python -P SCRIPT --help` for each of them, with what all of them import imported once: a second a script is left
# out so. Like -P, `run_path` puts no folder on the path.
ALL_OF_THEM = """
import os, runpy, sys, traceback
import torch, lightning, capgap.pipeline.workflow.carry_out
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
for script in sys.argv[1:]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writing, 1)
        sys.argv = [script, "--help"]
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)  # taking all those imports down would take a second
    os.close(writing)
    said = os.fdopen(reading).read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(os.path.basename(script), code, said.startswith("usage: "), flush=True)
"""


def clean_shell() -> dict[str, str]:
    """An environment in which nobody has set anything for Python, but where capgap is, as in this test."""
    kept = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}
    source = os.environ.get("PYTHONPATH")
    return kept if source is None else kept | {"PYTHONPATH": source}


def test_every_script_says_what_it_takes(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", ALL_OF_THEM, *map(str, SCRIPTS)]
    done = subprocess.run(
        command, cwd=tmp_path, env=clean_shell(), capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{script.name} 0 {script in COMMANDS}" for script in SCRIPTS], done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["-P"]], ids=["plain", "safe path"])
@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_a_script_says_what_it_takes_in_a_process_of_its_own(script: Path, flags: list[str], tmp_path: Path) -> None:
    command = [sys.executable, *flags, str(script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_shell(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ") == (script in COMMANDS)
