"""Suggests the setting or command that was meant, by its spelling and by the names used in other programs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from capgap.jobs import synonyms
from capgap.jobs.settings import all_settings, children, find
from capgap.jobs.yaml_nodes import Loc, dotted
from capgap.schemas.base import Record

_MOST = 3


def settings_like(record: type[Record], loc: Loc) -> list[str]:
    """Return full names of settings that may have been meant by an unknown one, the most probable first."""
    *outer, last = (str(part).lower().replace("-", "_") for part in loc)
    # number of parts up to the first that is no setting, for example 1 for `trian.alpha`
    number = next(n for n in range(1, len(loc) + 1) if find(record, loc[:n]) is None)
    if number < len(loc):
        mended = [(*name.split("."), *loc[number:]) for name in settings_like(record, loc[:number])]
        known_already = [dotted(one) for one in mended if find(record, one) is not None]
        return known_already or (settings_like(record, mended[0]) if mended else [])
    section = find(record, tuple(outer)) if outer else None
    siblings = {str(s.loc[-1]): s.name for s in children(section.section if section and section.section else record)}
    prefix = f"{dotted(tuple(outer))}." if outer else ""
    meant = synonyms.SETTINGS.get(last, ())
    if near := [name for name in (last, *(one.rpartition(".")[2] for one in meant)) if name in siblings]:
        return [prefix + near[0]]
    # outer settings first
    known = sorted((setting.name for setting in all_settings(record)), key=lambda name: name.count("."))
    if found := [name for name in meant if name in known]:
        return found
    if near := difflib.get_close_matches(last, siblings, n=1):
        return [prefix + near[0]]
    lasts = {name: name.rpartition(".")[2] for name in known}
    like = [last] if last in lasts.values() else difflib.get_close_matches(last, set(lasts.values()), n=1)
    found = [name for name, end in lasts.items() if end in like]
    return found[:_MOST] or difflib.get_close_matches(dotted(loc), known, n=1)


def command_like(name: str, commands: Iterable[str]) -> str | None:
    """Return the command that may have been meant by an unknown one; None if none is similar."""
    known = list(commands)
    if (meant := synonyms.COMMANDS.get(name.lower())) is not None and meant.split()[0] in known:
        return meant
    return next(iter(difflib.get_close_matches(name.lower(), known, n=1)), None)


def did_you_mean(names: Iterable[str]) -> str | None:
    """Return the question `did you mean ...?`, or None if there are no names."""
    found = list(names)
    return f"did you mean {' or '.join(found)}?" if found else None
