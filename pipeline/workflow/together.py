"""Carry out one instance of a stage in as many processes as it has devices.

one process:              carry_out
several devices:          launch the ranks, each of which calls this module again
one of several ranks:     rank 0 prepares the folder, publishes "begun", works, finishes it; the others wait, and work
"""

from __future__ import annotations

import logging

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.ranks import Rendezvous, ranks_in_environment, require_shares
from capgap.pipeline.stages import stage_named
from capgap.pipeline.workflow.carry_out import carry_out, work
from capgap.pipeline.workflow.launch import LOST, is_launched, launch
from capgap.pipeline.workflow.state import RunStates
from capgap.schemas.errors import MachineError
from capgap.schemas.run_file import RunFile


class LostRankError(MachineError):
    """Another process of this training has ended."""


def carry_out_on_devices(run: RunFile, instance: Instance, *, remake: bool = False, wait: bool = True) -> None:
    """Make the instance's folder current, with one process for each device that its training uses.

    Raises:
        SettingError: The sequences of a step do not divide among the processes.
        LostRankError: Another process ended first; the error is not shown if that process has reported the cause.
        CapgapError: Whatever the stage raises.
    """
    recipe = stage_named(instance.stage).training(run, instance)
    if recipe is None:
        carry_out(run, instance, remake=remake, wait=wait)
        return
    ranks = ranks_in_environment()
    if ranks is None:
        require_shares(recipe, recipe.num_devices)
        if recipe.num_devices > 1:
            launch(run, instance, recipe.num_devices, remake=remake, wait=wait)
        else:
            carry_out(run, instance, remake=remake, wait=wait)
        return
    rendezvous = Rendezvous(ranks, instance.name)
    try:
        require_shares(recipe, ranks.world_size)
        if ranks.is_first:
            carry_out(run, instance, remake=remake, wait=wait, rendezvous=rendezvous)
        else:
            _follow(run, instance, wait, rendezvous)
    except Exception as error:
        raise _as_one_voice(error, instance, rendezvous) from None


def _follow(run: RunFile, instance: Instance, wait: bool, rendezvous: Rendezvous) -> None:
    logging.getLogger("capgap").setLevel(logging.WARNING)
    if not rendezvous.wait_for("begun"):
        return
    known = RunStates(run)
    work(run, known.of(instance.name), known.inputs_of(instance), wait, rendezvous)


def _as_one_voice(error: Exception, instance: Instance, rendezvous: Rendezvous) -> Exception:
    """Return the error itself in the first process that fails, and in later ones an error that is not shown."""
    is_first_to_fail = rendezvous.is_first_to_fail()
    if rendezvous.ranks.is_first:
        rendezvous.publish("begun", False)
    if is_first_to_fail and not _lost_a_peer(error):
        return error
    lost = LostRankError(
        "another process of this training ended without reporting a cause",
        where=f"{instance.name}, rank {rendezvous.ranks.rank}",
        found=next(iter(str(error).splitlines()), type(error).__name__),
        fix="look for what killed it (memory?), and run the same command again",
    )
    lost.already_said = not is_first_to_fail or is_launched()
    if is_launched():
        lost.exit_code = LOST
    return lost


def _lost_a_peer(error: Exception) -> bool:
    """Return whether torch raised the error because another process has ended."""
    from torch import distributed

    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    return isinstance(error, distributed.DistError) or any(word in str(error) for word in words)
