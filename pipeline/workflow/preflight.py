"""Checks of everything that can be known before anything is made, for all stages to come.

    device --> given files, models and packages --> each stage: do its settings fit what it will read?

They prevent a run of hours from failing at its end over a word in the run file.
"""

from __future__ import annotations

from collections.abc import Sequence

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.device import resolve_device
from capgap.pipeline.stages import stage_named
from capgap.pipeline.workflow.remake import is_named
from capgap.pipeline.workflow.state import RunStates, State
from capgap.schemas.run_file import RunFile


def to_be_made(known: RunStates, chosen: Sequence[Instance], again: frozenset[str] = frozenset()) -> list[Instance]:
    """Return the chosen instances that are not current, or that are named to be made again."""
    return [one for one in chosen if known.of(one.name).state is not State.CURRENT or is_named(one, again)]


def require_possible(run: RunFile, coming: Sequence[Instance]) -> None:
    """Refuse a run that cannot end well, whichever of its stages would fail.

    Args:
        run: The run file.
        coming: Instances that are to be made.

    Raises:
        CapgapError: Whatever the checks of the stages find.
    """
    stages = [stage_named(name) for name in dict.fromkeys(one.stage for one in coming)]
    if run.device == "cuda" and any(stage.on_device for stage in stages):
        resolve_device(run.device)
    for one in coming:
        # this raises where a file that the run file names is missing
        stage_named(one.stage).sources(run, one)
    for stage in stages:
        stage.require_possible(run)
