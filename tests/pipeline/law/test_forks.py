"""Stages of a grid as forks of a process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from capgap.pipeline.law.forks import starter
from capgap.pipeline.stage.command import typed_command


def test_a_fork_knows_the_command_that_was_typed(tmp_path: Path, monkeypatch) -> None:
    typed = ["capgap", "law", "run", "my grid.yaml"]
    monkeypatch.setattr(sys, "argv", typed)
    monkeypatch.delenv("CAPGAP_COMMAND", raising=False)

    def main(arguments) -> int:
        (tmp_path / "said").write_text(json.dumps([typed_command(), arguments]))
        return 7

    assert starter(main)(["cache", "--config", "gone.json"]) == 7
    assert json.loads((tmp_path / "said").read_text()) == [typed, ["cache", "--config", "gone.json"]]
