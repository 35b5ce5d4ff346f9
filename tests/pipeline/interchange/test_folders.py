"""A folder that an import makes has the life of a stage's: a heartbeat, and the time of every attempt."""

from __future__ import annotations

import os
from pathlib import Path

from capgap.pipeline.interchange.folders import make_folder, order_for
from capgap.pipeline.stage.context import StageResult
from capgap.pipeline.stage.folder import WORK_FOLDER, begin
from capgap.pipeline.stage.heartbeat import current_heartbeat, read_heartbeats
from capgap.pipeline.stage.seconds import add_seconds


def test_an_import_has_a_heartbeat_and_counts_the_time_of_killed_attempts(tmp_path: Path) -> None:
    folder, order = tmp_path / "corpus", order_for("corpus", {"import": 1}, {})
    folder.mkdir()
    begin(folder, order)
    add_seconds(folder / WORK_FOLDER, 5000.0)
    seen: list[int] = []

    def work(there: Path) -> StageResult:
        seen.extend(beat.pid for beat in read_heartbeats(there / WORK_FOLDER))
        (there / "text").write_text("something")
        return StageResult()

    made = make_folder(folder, order, (), {}, work, force=False)
    assert seen == [os.getpid()] and current_heartbeat() is None
    # the time of this attempt itself, which is short, is counted too
    assert made.manifest.wall_s >= 5000.0
    assert [file.path for file in made.manifest.files] == ["text"]
    assert not (folder / WORK_FOLDER).exists()
