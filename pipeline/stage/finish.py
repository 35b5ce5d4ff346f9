"""The end of every stage and import: its manifest, of the files in its folder and of the time that they took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from capgap.pipeline.stage.command import typed_command
from capgap.pipeline.stage.context import StageResult
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.folder import WORK_FOLDER, content_files, finish, remove_halves
from capgap.pipeline.stage.heartbeat import current_heartbeat
from capgap.pipeline.stage.identity import content_of
from capgap.pipeline.stage.seconds import earlier_s
from capgap.pipeline.stage.versions import earlier_versions, versions
from capgap.schemas.manifest import Manifest, WorkOrder
from capgap.schemas.secrets import redacted, redacted_values


class Clock:
    """The time at which a stage was begun, and the seconds that this process has worked on it."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.begin()

    def begin(self) -> None:
        """Set the time at which the work begins, after any waiting."""
        self.begun_at = datetime.now(UTC).isoformat(timespec="seconds")

    @property
    def wall_s(self) -> float:
        """Seconds since this object was made, including any waiting."""
        return round(time.monotonic() - self._started, 3)


def finish_with(
    folder: Path,
    order: WorkOrder,
    result: StageResult,
    resolved: Mapping[str, Any],
    clock: Clock,
) -> Manifest:
    """Write the manifest of a folder with all its files, and remove half-written files of killed replicas or slices.

    Args:
        folder: Folder of the stage, which the caller has locked.
        order: Work order of the folder, with the files outside the folder that were read.
        result: What the stage adds to its manifest.
        resolved: Settings with their defaults.
        clock: Clock of this process.
    """
    remove_halves(folder)
    files = content_files(folder)
    manifest = Manifest(
        **order.model_dump(),
        content=content_of(files, order.sources),
        files=files,
        shard_sets=result.shard_sets,
        facts=result.facts,
        totals=result.totals,
        versions=versions(),
        earlier_versions=earlier_versions(folder / WORK_FOLDER),
        started=clock.begun_at,
        wall_s=round(clock.wall_s + earlier_s(folder / WORK_FOLDER), 3),
        command=tuple(map(redacted, typed_command())),
        resolved=redacted_values(resolved),
    )
    if (beat := current_heartbeat()) is not None:
        # stopped, because the folder of the heartbeat is removed
        beat.stop()
    finished = finish(folder, manifest)
    event("stage_done", f"{order.instance}: done in {clock.wall_s:.1f} s", wall_s=clock.wall_s, totals=result.totals)
    return finished
