"""A command imports what it needs and no more: what only reads manifests waits for no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEAVY = {
    "torch",
    "transformers",
    "lightning",
    "vllm",
    "pyarrow",
    "numpy",
    "matplotlib",
    "tokenizers",
    "datasets",
    "ray",
    "triton",
    "webdataset",
    "zstandard",
    "fsspec",
    "lm_eval",
    "asyncio",
}

_RUN = """
import json, sys
from capgap.jobs.cli import main
code = main(sys.argv[1:])
sys.stderr.write("\\n" + json.dumps([code, sorted(sys.modules)]))
"""


def modules_of(*arguments: str | Path, code: int = 0) -> set[str]:
    """The packages that a command has imported when it ends."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", _RUN, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    found, modules = json.loads(done.stderr.splitlines()[-1])
    assert found == code, done.stderr
    return {str(name).partition(".")[0] for name in modules}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["plan", "--help"], 0),
        (["train", "--help", "all"], 0),
        (["law", "run", "--help"], 0),
        (["ls"], 0),
        (["completion", "bash"], 0),
        (["init", "a/b"], 2),
        (["distill", "demo"], 2),
        (["status", "nowhere.yaml"], 2),
        (["run", "demo", "--train.lr", "3"], 2),
        (["cache", "demo", "--cache.top_k", "5"], 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_reads_no_manifest_imports_nothing_heavy(arguments: list[str], code: int) -> None:
    found = modules_of(*arguments, code=code)
    assert not found & (HEAVY | {"rich", "doit", "jinja2"})


def test_status_and_nothing_to_do_import_nothing_heavy(made: Any) -> None:
    folder, _ = made
    assert not modules_of("status", folder / "run.yaml") & HEAVY
    assert not modules_of("status", folder / "run.yaml", "--json") & HEAVY
    assert not modules_of("run", folder / "run.yaml", "--only", "corpus") & HEAVY
    assert not modules_of("corpus", folder / "run.yaml") & HEAVY


def test_the_table_that_ends_a_run_imports_no_model_and_no_shard() -> None:
    code = "import json, sys, capgap.pipeline.report.table; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    # its frontier has the law's arrays behind it
    assert not {name.partition(".")[0] for name in json.loads(done.stdout)} & (HEAVY - {"numpy"})
