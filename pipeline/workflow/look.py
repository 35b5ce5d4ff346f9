"""The state of a run as seen from outside: what its manifests say, and which processes of any machine are at work.

    manifests --states--+
    work/progress.json -+--> Look of each instance
    metrics.csv --------+

Nothing is written, and no lock of a stage's folder is taken.
"""

from __future__ import annotations

import csv
import os
import time
from dataclasses import dataclass
from pathlib import Path

from capgap.pipeline.stage.folder import WORK_FOLDER
from capgap.pipeline.stage.heartbeat import is_alive, read_heartbeats
from capgap.pipeline.stage.scalars import METRICS_NAME
from capgap.pipeline.workflow.state import StageState, State, states
from capgap.schemas.heartbeat import Heartbeat
from capgap.schemas.run_file import RunFile

# only the end of the file is read, which may have any length; a row has a few hundred bytes
_TAIL_BYTES = 1 << 14


@dataclass(frozen=True)
class Look:
    """The present state of one instance.

    Attributes:
        name: Name of the instance, or of a stage that is reused.
        state: State by its manifest; `reused` for a stage of another run.
        why: Why it is not current, in words; for a reused stage its folder.
        at_work: Heartbeats of the processes that work on it, the latest first.
        gone: Heartbeats of processes that ended without finishing it, the latest first.
        loss: `train_loss` of the last row that a training has logged.
    """

    name: str
    stage: str
    state: str
    why: str
    at_work: tuple[Heartbeat, ...] = ()
    gone: tuple[Heartbeat, ...] = ()
    loss: float | None = None

    @property
    def is_current(self) -> bool:
        """Whether nothing has to be done."""
        return self.state in (State.CURRENT, "reused")

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of all processes at work together."""
        rates = [beat.count.tokens_per_s for beat in self.at_work if beat.count and beat.count.tokens_per_s]
        return sum(rates) if rates else None

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end of what is counted now, for the slowest process."""
        lefts = [beat.count.eta_s for beat in self.at_work if beat.count and beat.count.eta_s is not None]
        return max(lefts) if lefts else None

    @property
    def seen_s_ago(self) -> float | None:
        """Seconds since the last heartbeat; None where there is no heartbeat."""
        beats = (*self.at_work, *self.gone)
        return max(0.0, time.time() - max(beat.written_s for beat in beats)) if beats else None


def look_at(run: RunFile) -> list[Look]:
    """Return the state of every instance, inputs before their readers, and after them that of the reused stages.

    Raises:
        InputError: A folder under `reuse` or `train.caches` holds no manifest of that stage.
        CorruptError: A manifest cannot be read.
    """
    try:
        found = states(run)
    except FileNotFoundError:
        # a stage emptied its folder while it was read
        found = states(run)
    looks = [_look(state) for state in found.values()]
    return looks + [Look(stage, stage, "reused", folder) for stage, folder in run.reuse.items()]


def _look(state: StageState) -> Look:
    name, stage = state.instance.name, state.instance.stage
    if state.state is State.CURRENT:
        return Look(name, stage, state.state, "")
    beats = read_heartbeats(state.folder / WORK_FOLDER)
    at_work = tuple(beat for beat in beats if is_alive(beat))
    gone = tuple(beat for beat in beats if beat not in at_work)
    loss = last_loss(state.folder / METRICS_NAME) if at_work else None
    return Look(name, stage, state.state, state.why, at_work, gone, loss)


def last_loss(metrics: Path) -> float | None:
    """Return `train_loss` of the last whole row that has one; None where there is none."""
    try:
        with metrics.open("rb") as file:
            header = file.readline().decode()
            begin = file.tell()
            end = file.seek(0, os.SEEK_END)
            file.seek(max(begin, end - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines(keepends=True)
    except OSError:
        return None
    names = next(csv.reader([header]), [])
    # the first line may have lost its beginning, and the last may be half-written
    for row in csv.reader(reversed([line for line in lines if line.endswith("\n")])):
        values = dict(zip(names, row, strict=False))
        if len(row) == len(names) and values.get("train_loss"):
            return float(values["train_loss"])
    return None
