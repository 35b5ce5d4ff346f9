"""Heartbeats: how far a stage is, kept on disk for other processes and machines to watch.

    stage: phases, meters --> memory --> one thread, at most once a second --> work/progress.json --> read_heartbeats
                                                       \\--> a log line for a waiting user, after some silence

Nothing is decided by the file. It lies in `work`, so it is no content and is removed when the stage is finished. After
a kill it stays there, and `is_alive` finds that its process is gone. Where several processes of a stage share a folder,
as slices do, each has a file of its own.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from capgap.pipeline.stage.events import current_stage, event, silent_s
from capgap.schemas.errors import CapgapError, MachineError
from capgap.schemas.heartbeat import Count, End, Heartbeat
from capgap.schemas.printable import fit_to_show

_PATTERN = "progress*.json"
_WRITE_EVERY_S = 1.0
# written also where nothing happens: a shard may take minutes
_BEAT_EVERY_S = 5.0
# NFS may show an old file for a minute, and clocks differ, in either direction
_BELIEVED_S = 120.0
# three times the longest pause between two heartbeats
_WATCHED_S = 15.0
_CRASHED, _INTERRUPTED = 1, 130
# Seconds of silence after which log lines name what is waited for; later lines follow at the last of these intervals.
_NAMED_AFTER_S = (2.0, 10.0, 30.0, 60.0)


class HeartbeatWriter:
    """The heartbeat of a process that works on a folder, which a thread of its own writes to a file.

    Args:
        path: File to write, in a folder that exists.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._over = path, threading.Lock(), threading.Event()
        self._counter: Callable[[], Count] | None = None
        self._first_done: int | None = None
        self._phase_since_s, self._num_named = time.monotonic(), 0
        # by a clock that nobody can set; the times in the file are for people and other machines
        self._has_advanced, self._written_at_s = False, time.monotonic()
        now = time.time()
        self._beat = Heartbeat(
            machine=os.uname().nodename,
            namespace=_namespace(),
            pid=os.getpid(),
            pid_started=_started(os.getpid()),
            phase="reads its inputs",
            begun_s=now,
            advanced_s=now,
            written_s=now,
        )
        self._write()
        self._thread = threading.Thread(target=self._write_now_and_then, name="heartbeat", daemon=True)
        self._thread.start()

    def begin_phase(self, phase: str, device: str | None = None) -> None:
        """Record what the stage does from here on, and on which device; a log line names it if it takes long."""
        self._phase_since_s, self._num_named = time.monotonic(), 0
        self._change(phase=phase, **({} if device is None else {"device": device}))

    def count_with(self, counter: Callable[[], Count] | None) -> None:
        """Call `counter` at every write to learn how far the stage is; with None, nothing is counted any more."""
        self._counter, begun = counter, counter() if counter else None
        self._first_done = None if begun is None else begun.done
        self._phase_since_s, self._num_named = time.monotonic(), 0
        self._change(count=begun, **({} if counter else {"phase": "goes on"}))

    def stop(self) -> None:
        """Stop the thread, so that nothing more is written."""
        self._over.set()
        self._thread.join()

    def leave(self) -> None:
        """Stop writing and remove the file, because what this process did is counted elsewhere."""
        self.stop()
        self._path.unlink(missing_ok=True)

    def end(self, error: BaseException) -> None:
        """Write down why the process gives up, as the last entry of the file."""
        self.stop()
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            ended = End(what="interrupted", exit_code=_INTERRUPTED)
        elif isinstance(error, CapgapError):
            ended = End(what=str(error), exit_code=error.exit_code)
        else:
            ended = End(what=fit_to_show(" ".join(f"{type(error).__name__}: {error}".split())), exit_code=_CRASHED)
        self._change(ended=ended)
        self._write()

    def _change(self, **values: object) -> None:
        with self._lock:
            self._beat = self._beat.model_copy(update={**values, "advanced_s": time.time()})
            self._has_advanced = True

    def _write_now_and_then(self) -> None:
        while not self._over.wait(_WRITE_EVERY_S):
            counter, last = self._counter, self._beat
            count = counter() if counter is not None else None
            if count is None or count.done == self._first_done:
                self._name_the_wait(last.phase if count is None else f"begins with {count.total} {count.unit}")
            # the time left changes even where no step is finished, so only a new count is an advance
            if count is not None and (last.count is None or count.done != last.count.done):
                self._change(count=count)
            if self._has_advanced or time.monotonic() - self._written_at_s >= _BEAT_EVERY_S:
                self._write()

    def _name_the_wait(self, phase: str) -> None:
        """Log what is waited for, after two seconds of silence and then less and less often."""
        waited_s = time.monotonic() - self._phase_since_s
        due_s = _NAMED_AFTER_S[min(self._num_named, len(_NAMED_AFTER_S) - 1)]
        due_s += _NAMED_AFTER_S[-1] * max(0, self._num_named + 1 - len(_NAMED_AFTER_S))
        if waited_s < due_s or silent_s() < min(_NAMED_AFTER_S[0], waited_s):
            return
        self._num_named += 1
        event("waiting", f"{current_stage()}: {phase} ({waited_s:.0f} s)", phase=phase, waited_s=round(waited_s, 1))

    def _write(self) -> None:
        with self._lock:
            self._beat = self._beat.model_copy(update={"written_s": time.time()})
            self._has_advanced, self._written_at_s = False, time.monotonic()
            text = self._beat.model_dump_json()
        half = self._path.with_suffix(".half")
        # a heartbeat that cannot be written does not stop the stage; no fsync, as it need not outlive the machine
        with contextlib.suppress(OSError):
            half.write_text(text)
            half.replace(self._path)


_current: HeartbeatWriter | None = None


@contextmanager
def heartbeat(work: Path, *, shared: bool = False) -> Iterator[HeartbeatWriter]:
    """Write a heartbeat into the folder `work` while the block runs; if the block fails, the file says how it ended.

    Args:
        work: The stage folder's `work`; made if need be.
        shared: Whether other processes work there too. They made the folder, and may finish the stage and remove it. If
            the block ends well, the heartbeat of this process is removed.
    """
    global _current
    if not shared:
        work.mkdir(exist_ok=True)
    path = work / (f"progress-{os.uname().nodename}-{os.getpid()}.json" if shared else "progress.json")
    writer = _current = HeartbeatWriter(path)
    try:
        yield writer
    except BaseException as error:
        writer.end(error)
        raise
    else:
        if shared:
            writer.leave()
    finally:
        writer.stop()
        _current = None


def begin_phase(phase: str, device: str | None = None) -> None:
    """Record what this process's stage, if there is one, does from here on, for example `loads the teacher`."""
    if _current is not None:
        _current.begin_phase(phase, device)


def current_heartbeat() -> HeartbeatWriter | None:
    """Return the heartbeat of the stage that this process works on; None where it works on none."""
    return _current


def read_heartbeats(work: Path) -> list[Heartbeat]:
    """Return every heartbeat below a stage folder's `work`, the latest first; unreadable files are left out."""
    found = []
    for path in heartbeat_files(work):
        with contextlib.suppress(OSError, ValidationError):
            found.append(Heartbeat.model_validate_json(path.read_bytes()))
    return sorted(found, key=lambda beat: beat.written_s, reverse=True)


def heartbeat_files(work: Path) -> list[Path]:
    """Return the paths of the heartbeat files below a stage folder's `work`."""
    return list(work.glob(_PATTERN))


def is_alive(beat: Heartbeat) -> bool:
    """Return whether the process is still at work: certain on its own machine, elsewhere judged by its last write."""
    if beat.ended is not None:
        return False
    if not _is_from_here(beat):
        return abs(time.time() - beat.written_s) < _BELIEVED_S
    return _is_running(beat.pid) and beat.pid_started == _started(beat.pid)


def require_nobody_elsewhere(work: Path) -> None:
    """Make sure that no process of another machine works on a folder whose lock this process holds.

    That happens where locks do not reach across machines, as on NFS that is mounted with `local_lock` or `nolock`. A
    heartbeat of another machine that has no end is watched for some seconds: if it changes, its process is alive. The
    clocks of the machines are not compared.

    Raises:
        MachineError: A process of another machine works on the folder.
    """
    seen = _of_elsewhere(work)
    if not seen:
        return
    where = ", ".join(sorted({beat.machine for beat in seen}))
    event("watching", f"{work.parent}: another machine ({where}) worked here; watching whether it still does")
    deadline = time.monotonic() + _WATCHED_S
    while time.monotonic() < deadline:
        time.sleep(_WRITE_EVERY_S)
        if moved := [beat for beat in _of_elsewhere(work) if beat not in seen]:
            raise MachineError(
                "another machine is at work on this folder, and the locks of its file system do not reach it",
                where=work.parent,
                found=f"pid {moved[0].pid} of {moved[0].machine}",
                fix="wait for it to end, or stop it; mount the file system with locks that reach across machines",
            )


def _of_elsewhere(work: Path) -> list[Heartbeat]:
    return [beat for beat in read_heartbeats(work) if beat.ended is None and not _is_from_here(beat)]


def _is_from_here(beat: Heartbeat) -> bool:
    return (beat.machine, beat.namespace) == (os.uname().nodename, _namespace())


def _namespace() -> str:
    """Return a name of this machine's process ids since its start; host names alone may be equal on two machines."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    fields = _stat(pid)
    # a killed process keeps its id until its parent has read its exit code
    return not fields or fields[0] not in "ZX"


def _started(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def _stat(pid: int) -> list[str]:
    """Return the fields of Linux's `stat` from the third, the state, on; the second is a name with any characters."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
