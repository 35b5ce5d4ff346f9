"""Check, before anything is made, that the disk has room for what a run will make.

    plan's work --> bytes of each stage to be made, less what its folder holds --> compared with the free bytes of `out`

The bytes are estimates, so a run is refused only where they exceed the free space by more than the estimates' error.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.events import event
from capgap.pipeline.workflow.state import RunStates
from capgap.schemas.amounts import bytes_text
from capgap.schemas.errors import MachineError

if TYPE_CHECKING:
    from capgap.pipeline.plan.work import RunWork

SURE_SHARE = 0.5
"""Share of the estimate that a run takes at least: text of another kind than was measured has up to twice as many bytes
per token, and sharp distributions of a teacher take half as many bytes as flat ones."""


def require_disk_space(known: RunStates, coming: Sequence[Instance]) -> None:
    """Refuse a run that the disk has no room for; figures that are not known count as zero.

    Args:
        known: States of the run's instances.
        coming: Instances that are to be made.

    Raises:
        MachineError: Half of the estimated bytes (`SURE_SHARE`) exceed the free space.
        InputError: A source of the corpus cannot be read.
    """
    if not coming:
        return
    # imported here, so that a run with nothing left to make does not wait for this import
    from capgap.pipeline.plan.work import work_of

    run = known.run
    out = nearest_folder(Path(run.out))
    free = shutil.disk_usage(out).free
    work = work_of(run, known.all(), None)
    parts = list(_parts(work, known, coming))
    needed = sum(num_bytes for _, num_bytes in parts)
    if needed <= free:
        return
    if needed * SURE_SHARE <= free:
        text = f"the disk may be too small: about {bytes_text(needed)} to be made, {bytes_text(free)} free in {out}"
        event("disk_warning", text, logging.WARNING, needed_bytes=needed, free_bytes=free)
        return
    name, largest = max(parts, key=lambda part: part[1])
    raise MachineError(
        "the disk has no room for what the run makes",
        where=str(out),
        found=f"{bytes_text(free)} free",
        expected=f"about {bytes_text(needed)}, of which {name} takes {bytes_text(largest)}",
        fix="free some, name another folder with `out`, or make less of it (`capgap plan` shows every stage's share); "
        "stages made one by one (`capgap cache RUN.yaml`) are not held to this estimate",
    )


def nearest_folder(path: Path) -> Path:
    """Return the folder itself, or its nearest parent that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _parts(work: RunWork, known: RunStates, coming: Sequence[Instance]) -> Iterator[tuple[str, float]]:
    """Yield the bytes that each stage will add to its folder, and the largest scratch, as stages run one at a time."""
    scratch = 0.0
    for instance in coming:
        whole = work.disk_bytes(instance.stage, instance.arm).value or 0
        yield instance.name, max(whole - _held_bytes(known.of(instance.name).folder), 0)
        scratch = max(scratch, work.scratch_bytes(instance.stage, instance.arm).value or 0)
    yield "the scratch of one stage", scratch


def _held_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
