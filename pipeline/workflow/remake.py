"""What has cost device time is never replaced because a flag was forgotten.

A finished teacher, cache, training or tuning whose settings or inputs have changed is kept until somebody names its
stage. The refusal comes before anything is made, and says which settings differ and how the run was started before.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import ValidationError

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stages import declared, stage_named
from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.workflow.graph import input_names
from capgap.pipeline.workflow.state import RunStates, StageState
from capgap.schemas.base import Record
from capgap.schemas.errors import MismatchError, SettingError
from capgap.schemas.secrets import redacted

LAST_COMMAND_NAME = "run.command.json"

EVERY_STAGE = frozenset({"*"})
"""As stages to make again: all of them."""

# in an error's line; the others are counted
_MOST_NAMED = 3


class LastCommand(Record):
    """`run.command.json`: how the run in this folder was started last."""

    flags: tuple[str, ...] = ()
    """The settings that were given beside the run file, but for `--out`: the file lies there."""

    command: tuple[str, ...] = ()
    """The whole command, as it was typed; empty where it was called from Python."""

    @classmethod
    def of(cls, given: Sequence[str], command: Sequence[str] = ()) -> LastCommand:
        """The command with these settings as flags."""
        return cls(flags=tuple(flag for flag in given if not flag.startswith("--out=")), command=tuple(command))


def write_command(out: Path, command: LastCommand) -> None:
    """Remember how a run was started."""
    command = LastCommand(flags=tuple(map(redacted, command.flags)), command=tuple(map(redacted, command.command)))
    write_atomically(out / LAST_COMMAND_NAME, command.model_dump_json(indent=1) + "\n")


def last_command(out: Path) -> LastCommand | None:
    """How the run in this folder was started last; None where that is not known."""
    try:
        return LastCommand.model_validate_json((out / LAST_COMMAND_NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def require_stages(names: Collection[str]) -> None:
    """Refuse names of stages to make again that are none.

    Raises:
        SettingError: one is neither a stage nor an instance of one.
    """
    known = [stage.name for stage in declared()]
    for name in names:
        if name.partition("/")[0] not in known:
            raise SettingError("no such stage", where="--remake", found=name, expected=f"one of {', '.join(known)}")


def is_named(instance: Instance, named: frozenset[str]) -> bool:
    """Whether an instance is among those to make again: by its stage, by stage and arm, in full, or with all others."""
    own = (name for name in named if instance.name == name or instance.name.startswith(f"{name}/"))
    return named == EVERY_STAGE or any(own)


def require_nothing_lost(known: RunStates, chosen: Sequence[Instance], named: frozenset[str]) -> None:
    """Refuse to replace what cost device time, unless its stage is among those that are to be made again.

    What only lost files is made again as it was, and what waits for an input may come out current.

    Raises:
        MismatchError: something finished would be replaced.
    """
    lost = lost_stages(known, [one for one in chosen if not is_named(one, named)])
    if lost:
        stages = dict.fromkeys(one.stage for one, _ in lost)
        permission = " ".join(f"--remake {stage}" for stage in stages)
        told = [(one.name, why) for one, why in lost]
        raise would_be_replaced(known.run.out, told, _as_before(Path(known.run.out)), permission)


def lost_stages(known: RunStates, chosen: Sequence[Instance]) -> list[tuple[Instance, str]]:
    """Those of the chosen instances that are finished, have cost device time and would be replaced, each with why."""
    costly = [one for one in chosen if stage_named(one.stage).is_costly(known.run, one)]
    finished = [state for state in (known.of(one.name) for one in costly) if state.manifest is not None]
    return [(state.instance, _why(known, state)) for state in finished if state.replaced]


def would_be_replaced(out: str, lost: Sequence[tuple[str, str]], restore: str, permission: str) -> MismatchError:
    """The refusal.

    Args:
        out: folder of the run, or of the grid.
        lost: what would be replaced, by name, each with why.
        restore: how to get the settings back with which they were made.
        permission: the flags that allow it.
    """
    told = [f"{name} ({why})" for name, why in lost[:_MOST_NAMED]]
    told += [f"{len(lost) - _MOST_NAMED} more"] if len(lost) > _MOST_NAMED else []
    return MismatchError(
        "finished stages would be replaced, and have cost device time",
        where=out,
        found=", ".join(told),
        expected="the settings that they were made with",
        fix=f"{restore}, choose another `out`, or replace them with {permission}",
    )


def _why(known: RunStates, state: StageState) -> str:
    """The cause in the user's words: a setting rather than the input that it changed, where that is to be had."""
    if not state.replaced.startswith("input "):
        return state.replaced
    for name in input_names(known.run, state.instance):
        if name in known.instances and known.of(name).replaced:
            return f"{name}: {_why(known, known.of(name))}"
    return state.replaced


def _as_before(out: Path) -> str:
    before = last_command(out)
    if before is None or not before.flags:
        return "restore the settings"
    return f"give the flags of the run before ({shlex.join(before.flags)})"
