"""Shows the state of a run as a table, as lines, or as JSON."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from capgap.pipeline.stage.lease import HeldLease
from capgap.pipeline.workflow.look import Look
from capgap.schemas.heartbeat import Heartbeat
from capgap.schemas.printable import fit_to_show
from capgap.schemas.run_file import RunFile

# A step or shard may take this long; after more time without progress the table says so.
_QUIET_S = 60.0
_STYLES = {"at work": "bold cyan", "current": "green", "reused": "green", "missing": "dim", "failed": "bold red"}


def as_table(
    run: RunFile, looks: Sequence[Look], leases: Sequence[HeldLease], height: int | None = None
) -> RenderableType:
    """Return a table of one row per instance, without columns that would be empty, and the machine's leases below.

    Args:
        run: the run file.
        looks: states of the run's instances.
        leases: leases that are held on this machine.
        height: lines that fit on the screen. If there are too few, stages without a process are counted and not listed.
    """
    room = len(looks) if height is None else max(height - len(leases) - 3, 1)
    shown, hidden = _that_fit(looks, room)
    at_work = any(look.at_work or look.gone for look in looks)
    table = Table(box=None, pad_edge=False)
    titles = ["stage", "state", "how far, or why"] if at_work else ["stage", "state", "why"]
    for title in titles:
        table.add_column(title, overflow="fold")
    if at_work:
        for title in ("tokens/s", "left", "loss", "device", "seen"):
            table.add_column(title, justify="right", no_wrap=True)
    for look in shown:
        state = _state(look)
        cells = [
            Text(look.name),
            Text(state, _STYLES.get(state, "yellow")),
            Text(fit_to_show(_how_far(look) or look.why)),
        ]
        # cells are Text, so that untrusted text in them is not read as rich's markup
        table.add_row(*cells, *(Text(fit_to_show(figure)) for figure in (_figures(look) if at_work else ())))
    below = [Text(f"and {count} more: {state}", "dim") for state, count in sorted(hidden.items())]
    below += [
        Text(fit_to_show(f"{lease.device} of this machine: {lease.holder}, pid {lease.pid}, since {lease.since}"))
        for lease in leases
    ]
    return Group(table, *below) if below else table


def as_line(look: Look) -> str:
    """Return the state of an instance as one line."""
    parts = [f"{look.name}: {_state(look)}", _how_far(look) or look.why]
    if look.at_work:
        tokens, left, loss, device, _ = _figures(look)
        parts += [f"{tokens} tokens/s"] if tokens else []
        parts += [f"{left} left"] if left else []
        parts += [f"loss {loss}"] if loss else []
        parts += [f"on {device}"] if device else []
    return ", ".join(part for part in parts if part)


def as_json(run: RunFile, looks: Sequence[Look], leases: Sequence[HeldLease]) -> str:
    """Return the state of a run as one JSON object on one line, whose names are stable."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    held = [{"device": one.device, "holder": one.holder, "pid": one.pid, "since": one.since} for one in leases]
    return json.dumps({"time": now, "run": run.name, "stages": [_values(look) for look in looks], "leases": held})


def _values(look: Look) -> dict[str, Any]:
    return {
        "instance": look.name,
        "state": str(look.state),
        "why": look.why,
        "at_work": [_as_json(beat) for beat in look.at_work],
        "ended": [_as_json(beat) for beat in look.gone],
        "tokens_per_s": look.tokens_per_s,
        "eta_s": look.eta_s,
        "train_loss": look.loss,
        "seen_s_ago": None if look.seen_s_ago is None else round(look.seen_s_ago, 1),
    }


def _as_json(beat: Heartbeat) -> dict[str, Any]:
    return beat.model_dump(mode="json", exclude={"namespace", "pid_started"})


def _that_fit(looks: Sequence[Look], room: int) -> tuple[list[Look], Counter[str]]:
    """Return as many looks as fit, first of working and then of ended stages, and the number of others by state."""
    if len(looks) <= room:
        return list(looks), Counter()
    ranked = sorted(looks, key=lambda look: (not look.at_work, not look.gone, look.is_current))
    kept = {look.name for look in ranked[:room]}
    return [look for look in looks if look.name in kept], Counter(_state(look) for look in ranked[room:])


def _state(look: Look) -> str:
    if look.at_work:
        return "at work"
    return "failed" if look.gone and look.gone[0].ended and look.gone[0].ended.exit_code != 130 else look.state


def _how_far(look: Look) -> str:
    """Return the progress of a stage that a process works on or worked on; empty for other stages."""
    if look.at_work:
        several = f"{look.why}, by {len(look.at_work)} processes: " if len(look.at_work) > 1 else ""
        return several + _doing(look.at_work[0])
    if look.gone:
        ended = look.gone[0].ended
        return f"{look.why}; {ended.what if ended else 'its process was killed'}"
    return ""


def _doing(beat: Heartbeat) -> str:
    quiet_s = time.time() - beat.advanced_s
    quiet = f", nothing new for {_time(quiet_s)}" if quiet_s > _QUIET_S else ""
    count = beat.count
    if count is None:
        return beat.phase + quiet
    _, _, part = count.title.partition(": ")
    note = f", {count.note}" if count.note else ""
    return f"{count.done:,} of {count.total:,} {count.unit}{f' ({part})' if part else ''}{note}{quiet}"


def _figures(look: Look) -> tuple[str, str, str, str, str]:
    """Return tokens per second, time left, loss, device and age of the last heartbeat, as texts."""
    devices = sorted({f"{beat.device} of {beat.machine}" for beat in look.at_work if beat.device})
    return (
        f"{look.tokens_per_s:,.0f}" if look.tokens_per_s is not None else "",
        _time(look.eta_s) if look.eta_s is not None else "",
        f"{look.loss:.4f}" if look.loss is not None else "",
        ", ".join(devices),
        f"{_time(look.seen_s_ago)} ago" if look.seen_s_ago is not None else "",
    )


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{minutes} min" if minutes < 120 else f"{hours} h {minutes % 60:02d} min"
