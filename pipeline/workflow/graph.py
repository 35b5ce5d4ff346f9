"""The graph of a run: its instances in an order that can be carried out, and what each reads.

The order and the inputs are derived from what the stages declare (`pipeline/stages.py`); no stage is named here.
"""

from __future__ import annotations

from typing import Any

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stages import declared, stage_named
from capgap.schemas.errors import SettingError
from capgap.schemas.manifest import STANDS_FOR
from capgap.schemas.run_file import RunFile


def instances(run: RunFile) -> list[Instance]:
    """Return every instance of every stage that the run makes, inputs before their readers.

    Apart from that they are in the order of the stages; an instance may read an earlier one of its own stage.
    """
    known = {instance.name: instance for stage in declared() for instance in stage.instances(run)}
    ordered: dict[str, Instance] = {}
    visited: set[str] = set()

    def visit(name: str) -> None:
        if name in ordered or name not in known:
            return  # a reused stage has no instance
        assert name not in visited, f"{name} reads what is made from it"
        visited.add(name)
        for read in input_names(run, known[name]):
            visit(read)
        ordered[name] = known[name]

    for name in known:
        visit(name)
    return list(ordered.values())


def select(run: RunFile, *patterns: str) -> list[Instance]:
    """Return the instances with these names, in the run's order: a stage (`train`), stage and arm, or a full name.

    Raises:
        SettingError: A pattern matches no instance.
    """
    known = instances(run)
    found: set[Instance] = set()
    for pattern in patterns:
        named = {i for i in known if i.name == pattern or i.name.startswith(pattern + "/")}
        if not named:
            reused = f" ({pattern} is reused from {run.reuse[pattern]})" if pattern in run.reuse else ""
            stages = ", ".join(dict.fromkeys(i.stage for i in known))
            raise SettingError("no such stage in this run", found=pattern + reused, expected=f"one of {stages}")
        found |= named
    return [instance for instance in known if instance in found]


def downstream(run: RunFile, pattern: str) -> list[Instance]:
    """Return the instances that `pattern` names and all that depend on them."""
    chosen = {i.name for i in select(run, pattern)}
    known = instances(run)
    for instance in known:
        if any(name in chosen for name in input_names(run, instance)):
            chosen.add(instance.name)
    return [i for i in known if i.name in chosen]


def input_names(run: RunFile, instance: Instance) -> list[str]:
    """Return the names of the instances, or reused stages, that this instance reads."""
    return list(stage_named(instance.stage).inputs(run, instance))


def roles(run: RunFile, instance: Instance) -> dict[str, str]:
    """Return the role of each of `input_names`, by name: the role that the stage declares, or else the name itself.

    A stage whose result takes the place of a cache has the role `cache`.
    """
    named = stage_named(instance.stage).roles(run, instance)
    return {name: named.get(name, STANDS_FOR.get(name, name)) for name in input_names(run, instance)}


def further_caches(run: RunFile, instance: Instance) -> dict[str, str]:
    """Return the finished caches of other runs that the instance reads: folder or URL, by the name of the input."""
    return stage_named(instance.stage).further(run, instance)


def decisive_settings(run: RunFile, instance: Instance) -> dict[str, Any]:
    """Return the settings that decide the result: instances with equal ones and equal inputs give an equal result."""
    return dict(stage_named(instance.stage).settings(run, instance))
