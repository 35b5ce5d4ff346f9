"""The command before any command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from capgap.jobs.arguments import parse_run
from capgap.jobs.commands import stage_parser
from capgap.schemas.run_train import FurtherCache

DEMO = Path(__file__).parents[2] / "jobs" / "runs" / "demo.yaml"


def test_torch_is_not_imported_before_its_threads_are_told_how_to_wait() -> None:
    code = "import sys, capgap.jobs.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True).stdout == b"False\n"


def test_further_caches_are_a_flag_too() -> None:
    flag = '{"code": {"path": "s3://caches/code", "weight": 2}, "samples": {"recording": "sampled"}}'
    run, *_ = parse_run(stage_parser("train"), [str(DEMO), "--train.caches", flag, "--train.row_len", "512"])
    assert run.train.caches == {
        "code": FurtherCache(path="s3://caches/code", weight=2),
        "samples": FurtherCache(recording="sampled"),
    }
    assert run.train.row_len == 512
