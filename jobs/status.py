"""`capgap status`: shows the state of every stage, once or for as long as the run works."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capgap.jobs.arguments import Parser, number, parse_run, run_file_parser
from capgap.jobs.faults import CRASHED, INTERRUPTED
from capgap.jobs.logs import log, log_format
from capgap.pipeline.stage.lease import held_leases
from capgap.pipeline.workflow.look import Look, look_at
from capgap.pipeline.workflow.remake import LastCommand, last_command
from capgap.schemas.errors import MachineError, SettingError
from capgap.schemas.heartbeat import End
from capgap.schemas.printable import fit_to_show
from capgap.schemas.run_file import RunFile

_EVERY_S = 2.0
# Largest share of the time spent on looking: in a run of thousands of shards a look takes long, and the stages need
# the machine.
_LOOKING_SHARE = 0.2
# Between two stages nothing works while the next stage's packages are imported; a watch ends only after this time.
_QUIET_S = 120.0


def status_command(argv: Sequence[str]) -> int:
    """Run `capgap status`: show one line per stage; with `--watch` again and again, until all is current or one failed.

    Returns:
        0, or the exit code of a watched stage that failed.
    """
    run, flags = _as_last_started(argv)
    every_s = _EVERY_S if flags["every"] is None else flags["every"]
    if flags["every"] is not None and not flags["watch"]:
        raise SettingError(
            "is for --watch",
            where="--every",
            found=f"{flags['every']:g}",
            expected="--watch beside it",
            fix="give both, or neither",
        )
    if not 0.1 <= every_s < float("inf"):
        raise SettingError("not an interval", where="--every", found=every_s, expected="at least 0.1 seconds")
    if not flags["watch"]:
        _show_once(run, flags["json"])
        return 0
    try:
        return _Watch(run, every_s, flags["json"]).to_the_end()
    except KeyboardInterrupt:
        # the usual way to end a watch, so that no message is needed
        return INTERRUPTED


def _as_last_started(argv: Sequence[str]) -> tuple[RunFile, dict[str, Any]]:
    """Return the run and the command's flags. Without settings as flags, those of the last `capgap run` are used."""
    run, flags, given = parse_run(status_parser(), argv)
    last = None if LastCommand.of(given).flags else last_command(Path(run.out))
    if last is None or not last.flags:
        return run, flags
    run, flags, _ = parse_run(status_parser(), [*argv, *last.flags])
    log("flags_remembered", f"with the flags of the last run: {shlex.join(last.flags)}", flags=list(last.flags))
    return run, flags


def status_parser() -> Parser:
    """Return the parser of `capgap status`."""
    parser = run_file_parser("capgap status", "Say of every stage whether it is current, and why not.")
    parser.add_argument(
        "--watch", action="store_true", help="Keep watching until all is current, or until a working stage fails."
    )
    parser.add_argument("--every", type=number, default=None, help="With --watch: seconds between updates; default 2.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object for each update.")
    return parser


def _show_once(run: RunFile, json_wanted: bool) -> None:
    # imported here and below, because refusing a wrong run file needs no tables
    from capgap.jobs.status_view import as_json, as_table
    from capgap.jobs.tables import print_wide

    looks = look_at(run)
    if json_wanted:
        print(as_json(run, looks, held_leases()))
    elif log_format() == "json":
        for look in looks:
            log("stage_state", f"{look.name}: {look.state}", instance=look.name, state=look.state, why=look.why)
    else:
        print_wide(as_table(run, looks, ()))


class _Watch:
    """Looks at a run repeatedly, and remembers which stages were at work."""

    def __init__(self, run: RunFile, every_s: float, json_wanted: bool) -> None:
        self._run, self._every_s, self._json = run, every_s, json_wanted
        self._looks: list[Look] = []
        self._began_s, self._took_s = time.time(), 0.0
        self._quiet_since_s: float | None = None
        self._seen: set[str] = set()
        self._logged: dict[str, str] = {}

    def to_the_end(self) -> int:
        """Show the run until nothing is left to watch, and return the exit code."""
        from rich.live import Live

        from capgap.jobs.status_view import as_table
        from capgap.jobs.tables import ResultConsole, print_wide

        console = ResultConsole()
        if self._json or log_format() == "json" or not console.is_terminal or console.is_dumb_terminal:
            while not self._look_is_last():
                self._log()
            self._log()
        else:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                while not self._look_is_last():
                    live.update(as_table(self._run, self._looks, held_leases(), console.height - 1), refresh=True)
            print_wide(as_table(self._run, self._looks, held_leases()))
        return self._code()

    def _look_is_last(self) -> bool:
        """Wait, look, and return whether the watch ends: all is current, a stage failed, or nothing works any more."""
        if self._looks:
            time.sleep(max(self._every_s, self._took_s / _LOOKING_SHARE))
        begun = time.monotonic()
        self._looks = look_at(self._run)
        self._took_s = time.monotonic() - begun
        if at_work := {look.name for look in self._looks if look.at_work}:
            self._seen |= at_work
            self._quiet_since_s = time.monotonic()
            return False
        return all(look.is_current for look in self._looks) or self._failed() is not None or self._is_quiet()

    def _is_quiet(self) -> bool:
        """Return whether a stage has been at work, but none for two minutes."""
        return self._quiet_since_s is not None and time.monotonic() - self._quiet_since_s > _QUIET_S

    def _failed(self) -> Look | None:
        """Return the last stage that was at work since the watch began and ended without being finished, or None."""
        failed = [
            look
            for look in self._looks
            if look.gone and (look.name in self._seen or look.gone[0].written_s > self._began_s)
        ]
        return max(failed, key=lambda look: look.gone[0].written_s, default=None)

    def _code(self) -> int:
        failed = self._failed()
        if all(look.is_current for look in self._looks):
            return 0
        if failed is None:
            left = next(look for look in self._looks if not look.is_current)
            raise MachineError(
                "no process works on the run any more",
                where=left.name,
                found=f"{left.state}, {left.why}",
                expected="current",
                fix="run `capgap run RUN.yaml` again",
            )
        ended = failed.gone[0].ended or _killed()
        print(fit_to_show(f"capgap: {failed.name}: {ended.what}"), file=sys.stderr)
        return ended.exit_code or CRASHED

    def _log(self) -> None:
        from capgap.jobs.status_view import as_json, as_line

        if self._json:
            print(as_json(self._run, self._looks, held_leases()), flush=True)
            return
        for look in self._looks:
            state, text = "at work" if look.at_work else look.state, as_line(look)
            if self._logged.get(look.name) == text:
                continue
            self._logged[look.name] = text
            log("stage_state", text, instance=look.name, state=state, why=look.why or None)


def _killed() -> End:
    error = MachineError("its process ended without a message", fix="look for what killed it (memory?); run it again")
    return End(what=str(error), exit_code=error.exit_code)
