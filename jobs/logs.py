"""Prints and logs what a command reports: text for people, or one JSON object per line.

results      --> stdout    tables and lines, or JSON
all the rest --> stderr    progress, warnings, the final error: lines, or JSON
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Literal, TextIO, cast

from capgap.pipeline.stage.events import current_stage, set_stage
from capgap.schemas.errors import CapgapError, SettingError, SettingsError
from capgap.schemas.printable import fit_to_show
from capgap.schemas.secrets import redacted_values

LOG_FORMATS = ("text", "json")
LogFormat = Literal["text", "json"]

# The environment variable passes the format on to the processes of the stages.
_VARIABLE = "CAPGAP_LOG_FORMAT"
_FLAG = "--log-format"

LOG_FORMAT_HELP = f"`text`, or `json`: one object per line on stdout and stderr. {_VARIABLE} sets it too."


def set_up_logs(arguments: Sequence[str]) -> None:
    """Set format and levels of all logs from now on, in this process and in those that it starts.

    An unknown format in `--log-format` is not refused here but by the command's own parser.

    Raises:
        SettingError: CAPGAP_LOG_FORMAT names an unknown format and no flag overrides it. Logs are then text.
    """
    given = os.environ.get(_VARIABLE, "")
    asked = _asked_for(arguments) or given
    os.environ[_VARIABLE] = asked if asked in LOG_FORMATS else "text"
    set_stage("")
    root, handler = logging.getLogger(), _Stderr()
    handler.setFormatter(_Json() if log_format() == "json" else _Text("%(message)s"))
    for old in [old for old in root.handlers if isinstance(old, _Stderr)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("capgap").setLevel(logging.INFO)
    if log_format() == "json":
        logging.captureWarnings(True)
        # keep vLLM from writing lines in its own format; its errors are logged as JSON
        os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
        logging.getLogger("vllm").setLevel(logging.ERROR)
    if given == asked and given not in ("", *LOG_FORMATS):
        raise SettingError("no such format", where=_VARIABLE, found=given, expected=" or ".join(LOG_FORMATS))


def log_format() -> LogFormat:
    """Return the format of logs: `text` or `json`."""
    return cast(LogFormat, os.environ.get(_VARIABLE, "text"))


def log(name: str, text: str, /, **fields: Any) -> None:
    """Print a result of the command on stdout: the text, or in format `json` an event `name` with its fields."""
    if log_format() == "text":
        print(fit_to_show(text), flush=True)
        return
    print(_line("info", name, text, {key: value for key, value in fields.items() if value is not None}), flush=True)


def log_error(error: CapgapError) -> None:
    """Write the final line of a command that failed with a known error; for several settings, one line each."""
    for one in error.problems if isinstance(error, SettingsError) else (error,):
        parts = {part: getattr(one, part) for part in ("what", "where", "found", "expected", "fix")}
        said = {part: fit_to_show(str(value)) for part, value in parts.items() if value is not None}
        _last(f"capgap: {one}", "failed", {"error": type(one).__name__, "exit_code": one.exit_code, **said})


def log_interrupted(exit_code: int) -> None:
    """Write the final line of a command that was interrupted."""
    _last("capgap: interrupted; the same command goes on from here", "interrupted", {"exit_code": exit_code})


def log_crash(error: BaseException, exit_code: int) -> None:
    """Write the final lines of a command that met an unexpected exception: the traceback, and what to report."""
    trace = "".join(traceback.format_exception(error))
    if log_format() == "text":
        sys.stderr.write(fit_to_show(trace))
    _last(
        f"capgap: {type(error).__name__} was not expected: this is a bug in capgap or in a package that it uses; "
        "please report the command, the lines above and what `capgap --version` says",
        "crashed",
        {"error": type(error).__name__, "exit_code": exit_code, "traceback": trace},
    )


def _last(text: str, name: str, fields: dict[str, Any]) -> None:
    line = fit_to_show(text) if log_format() == "text" else _line("error", name, text.removeprefix("capgap: "), fields)
    print(line, file=sys.stderr, flush=True)


def _asked_for(arguments: Sequence[str]) -> str:
    for word, following in pairwise([*arguments, ""]):
        if word == _FLAG:
            return following
        if word.startswith(f"{_FLAG}="):
            return word.partition("=")[2]
    return ""


def _line(level: str, name: str, text: str, fields: dict[str, Any]) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    record = {"time": now, "level": level, "stage": current_stage(), "event": name, "message": text, "fields": fields}
    # turn values that JSON does not know into text first, so that redaction sees the text
    return json.dumps(redacted_values(json.loads(json.dumps(record, default=str))))


class _Text(logging.Formatter):
    """Formats a record as its message alone, safe to show on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return fit_to_show(super().format(record))


class _Json(logging.Formatter):
    """Formats a record as one JSON object. Records of other packages are events `log` with the logger's name."""

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "fields", {}))
        if record.name != "capgap":
            fields["logger"] = record.name
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return _line(record.levelname.lower(), getattr(record, "event", "log"), record.getMessage(), fields)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`, which a progress bar replaces to show lines above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """The current `sys.stderr`."""
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AssertionError("the stream is sys.stderr")
