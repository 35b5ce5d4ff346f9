"""`capgap ls`: lists the run files that are shipped, or the runs in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from capgap.jobs.arguments import Parser, parse
from capgap.jobs.logs import log
from capgap.jobs.shipped import FOLDER, first_comment, shipped_names
from capgap.schemas.errors import InputError
from capgap.schemas.manifest import MANIFEST_NAME, WORK_NAME
from capgap.schemas.printable import printable_name

# A run is found at most this many folders below the listed one.
_DEPTH = 3


def ls_command(argv: Sequence[str]) -> int:
    """Run `capgap ls`: print one line for each run file or run."""
    flags = parse(ls_parser(), argv)
    found = list(_shipped() if flags["folder"] is None else _runs(Path(flags["folder"])))
    if flags["json"]:
        print(json.dumps(found))
        return 0
    if not found:
        log("no_runs", f"{flags['folder']}: no runs", folder=flags["folder"])
    width = max((len(one["name"]) for one in found), default=0)
    for one in found:
        name, says = printable_name(one["name"]), printable_name(one["says"])
        log("listed", f"{name:<{width}}  {says}".rstrip(), **one)
    return 0


def ls_parser() -> Parser:
    """Return the parser of `capgap ls`."""
    parser = Parser("capgap ls", "List the run files that are shipped, or the runs in a folder.")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="A folder that holds runs, for example runs.")
    parser.add_argument("--json", action="store_true", help="Print one JSON list.")
    return parser


def _shipped() -> Iterator[dict[str, Any]]:
    for name in shipped_names():
        path = FOLDER / f"{name}.yaml"
        yield {"name": name, "says": first_comment(path), "path": str(path)}


def _runs(folder: Path) -> Iterator[dict[str, Any]]:
    """Find the runs in a folder by the files of their stages. A stage without a manifest counts as unfinished."""
    if not folder.is_dir():
        raise InputError("no such folder", where=folder, expected="a folder with runs")
    runs: dict[Path, dict[str, str]] = {}
    for at, inner, files in os.walk(folder, followlinks=True):
        here = Path(at)
        parts = here.relative_to(folder).parts
        if MANIFEST_NAME in files or WORK_NAME in files:
            inner.clear()
            stage = "finished" if MANIFEST_NAME in files else "unfinished"
            runs.setdefault(_run_of(here, folder), {})[here.as_posix()] = stage
        elif len(parts) > 2 * _DEPTH:
            inner.clear()
        inner.sort()
    for run, stages in sorted(runs.items()):
        counts = {state: list(stages.values()).count(state) for state in ("finished", "unfinished")}
        says = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        yield {"name": run.as_posix(), "says": f"stages: {says}", **counts}


def _run_of(stage: Path, folder: Path) -> Path:
    """Return the run's folder, which is three folders above `train/ARM/seed-0` and one above `corpus`."""
    from capgap.jobs.registry import stage_names

    parents = [parent for parent in (stage, *stage.parents) if parent.is_relative_to(folder)]
    return next((parent.parent for parent in parents if parent.name in stage_names()), stage.parent)
