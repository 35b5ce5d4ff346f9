"""Protection of what has cost device time: it is never replaced because a flag was forgotten.

A finished teacher, cache, training or tuning whose settings or inputs have changed is kept until somebody names its
stage. So is an unfinished stage that was begun under other settings or from other sources and has finished units. The
refusal comes before anything is made, and says what differs and how the run was started before.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import ValidationError

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.folder import is_untouched
from capgap.pipeline.stages import stage_named
from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.workflow.graph import input_names
from capgap.pipeline.workflow.state import RunStates, StageState, State
from capgap.schemas.base import Record
from capgap.schemas.errors import MismatchError, SettingError
from capgap.schemas.secrets import redacted

LAST_COMMAND_NAME = "run.command.json"

EVERY_STAGE = frozenset({"*"})
"""The value of the stages to make again that means all of them."""

# names that an error lists; of the others it gives the number
_MOST_NAMED = 3
_MOST_KNOWN = 12

_UNFINISHED = "unfinished, "


class LastCommand(Record):
    """`run.command.json`: how the run in this folder was started last."""

    flags: tuple[str, ...] = ()
    """The settings that were given beside the run file, except `--out`, which is the folder of this file."""

    command: tuple[str, ...] = ()
    """The whole command, as it was typed; empty where it was called from Python."""

    @classmethod
    def of(cls, given: Sequence[str], command: Sequence[str] = ()) -> LastCommand:
        """Make the record of a command with these settings as flags."""
        return cls(flags=tuple(flag for flag in given if not flag.startswith("--out=")), command=tuple(command))


def write_command(out: Path, command: LastCommand) -> None:
    """Write down how a run was started, with secrets removed."""
    command = LastCommand(flags=tuple(map(redacted, command.flags)), command=tuple(map(redacted, command.command)))
    write_atomically(out / LAST_COMMAND_NAME, command.model_dump_json(indent=1) + "\n")


def last_command(out: Path) -> LastCommand | None:
    """Return how the run in this folder was started last; None where that is not known."""
    try:
        return LastCommand.model_validate_json((out / LAST_COMMAND_NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def require_named(names: Collection[str], chosen: Sequence[Instance]) -> None:
    """Refuse a name of something to make again if it matches no instance of the command.

    Raises:
        SettingError: A name matches none of the chosen instances.
    """
    for name in names:
        if not any(_is_called(one, name) for one in chosen):
            # if the stage exists, the arm or the seed is wrong, so its instances are listed
            near = [one.name for one in chosen if one.stage == name.partition("/")[0]]
            known = near or list(dict.fromkeys(one.stage for one in chosen))
            more = f" and {len(known) - _MOST_KNOWN} more" if len(known) > _MOST_KNOWN else ""
            raise SettingError(
                "names nothing that this command makes",
                where="--remake",
                found=name or "no name",
                expected=f"one of {', '.join(known[:_MOST_KNOWN])}{more}",
            )


def is_named(instance: Instance, named: frozenset[str]) -> bool:
    """Return whether an instance is to be made again: named by stage, by stage and arm, in full, or with all others."""
    return named == EVERY_STAGE or any(_is_called(instance, name) for name in named)


def _is_called(instance: Instance, name: str) -> bool:
    return instance.name == name or instance.name.startswith(f"{name}/")


def require_nothing_lost(
    known: RunStates, chosen: Sequence[Instance], named: frozenset[str], coming: Sequence[Instance] | None = None
) -> None:
    """Refuse to replace what cost device time, unless its stage is named to be made again.

    A stage that only lost files is made again as it was, and one that waits for an input may come out current, so
    neither is refused.

    Args:
        known: States of the run's instances.
        chosen: Instances that the command goes through.
        named: Names of what is to be made again.
        coming: The chosen instances that are about to be made; by default all.

    Raises:
        MismatchError: A finished stage would be replaced, or an unfinished one was begun under other settings or from
            other sources.
    """
    unnamed = [one for one in chosen if not is_named(one, named)]
    if lost_stages(known, unnamed if coming is None else [one for one in coming if one in unnamed]):
        # one refusal covers everything that the command would replace later
        lost = lost_stages(known, unnamed)
        permission = _permission(known, unnamed, [one for one, _ in lost])
        told = [(one.name, why) for one, why in lost]
        raise would_be_replaced(known.run.out, told, _as_before(Path(known.run.out)), permission)


def lost_stages(known: RunStates, chosen: Sequence[Instance]) -> list[tuple[Instance, str]]:
    """Return the chosen instances whose work would be thrown away, each with the reason.

    They are finished, have cost device time and would be replaced; or they are unfinished, have finished units, and
    were begun under other settings or from other sources.
    """
    lost = []
    for one in chosen:
        state = known.of(one.name)
        if state.begun_otherwise and not is_untouched(state.folder):
            lost.append((one, _UNFINISHED + _why(known, state)))
        elif state.manifest is not None and state.replaced and stage_named(one.stage).is_costly(known.run, one):
            lost.append((one, _why(known, state)))
    return lost


def _permission(known: RunStates, chosen: Sequence[Instance], lost: Sequence[Instance]) -> str:
    """Return the shortest flags that name everything that would be replaced, and nothing that may stay."""
    kept = [one for one in chosen if one not in lost and known.of(one.name).state is not State.MISSING]
    names: dict[str, None] = {}
    for instance in lost:
        parts = instance.name.split("/")
        shorter = ("/".join(parts[:number]) for number in range(1, len(parts)))
        names[next((one for one in shorter if not any(_is_called(other, one) for other in kept)), instance.name)] = None
    return " ".join(f"--remake {name}" for name in names)


def would_be_replaced(out: str, lost: Sequence[tuple[str, str]], restore: str, permission: str) -> MismatchError:
    """Return the error that refuses to replace stages.

    Args:
        out: Folder of the run, or of the grid.
        lost: Name of each stage that would be replaced, with the reason.
        restore: Advice on how to restore the settings with which they were made.
        permission: Flags that allow it.
    """
    what = "finished stages would be replaced, and have cost device time"
    if all(why.startswith(_UNFINISHED) for _, why in lost):
        begun = "this stage is unfinished and was" if len(lost) == 1 else "these stages are unfinished and were"
        what = f"{begun} begun under other settings or from other sources"
    told = [f"{name} ({why})" for name, why in lost[:_MOST_NAMED]]
    told += [f"{len(lost) - _MOST_NAMED} more"] if len(lost) > _MOST_NAMED else []
    return MismatchError(
        what,
        where=out,
        found=", ".join(told),
        expected="the settings and sources that they were made with",
        fix=f"{restore}, choose another `out`, or replace them with {permission}",
    )


def _why(known: RunStates, state: StageState) -> str:
    """Return the cause in the user's words: where possible a changed setting, not the input that it changed."""
    why = state.replaced or state.begun_otherwise
    if not why.startswith("input "):
        return why
    for name in input_names(known.run, state.instance):
        if name in known.instances and (upstream := known.of(name)) and (upstream.replaced or upstream.begun_otherwise):
            return f"{name}: {_why(known, upstream)}"
    return why


def _as_before(out: Path) -> str:
    before = last_command(out)
    if before is None or not before.flags:
        return "restore what changed"
    return f"give the flags of the run before ({shlex.join(before.flags)})"
