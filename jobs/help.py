"""`--help`: shows a command on one screen, the settings of a section, or all settings, in the words of the schemas."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence

from capgap.jobs.arguments import Parser, integer, number
from capgap.jobs.settings import Setting, all_settings, children, find
from capgap.jobs.suggest import did_you_mean, settings_like
from capgap.schemas.base import Record
from capgap.schemas.errors import SettingError

_WIDTH = 100
_COLUMN = 28

# The settings that are set most often, by section. A command shows those of its own section first.
COMMON: dict[str, tuple[str, ...]] = {
    "corpus": ("corpus.sources", "corpus.tokenizer", "corpus.seq_len", "corpus.context", "corpus.teacher_fraction"),
    "teacher": ("teacher.path", "teacher.model", "teacher.training", "teacher.adapt", "teacher.served"),
    "cache": ("cache.recording", "cache.num_samples", "cache.top_k", "cache.max_tokens", "cache.engine"),
    "align": ("align.tokenizer", "align.seq_len", "align.bos", "align.min_border_probability"),
    "student": ("student.path", "student.model", "student.prune"),
    "train": ("train.learning_rate", "train.batch_sequences", "train.num_epochs", "train.alpha", "train.precision"),
    "rounds": ("rounds.prompts", "rounds.num", "rounds.first_writer", "rounds.max_new_tokens", "rounds.num_samples"),
    "tune": ("tune.sources", "tune.learning_rate", "tune.num_epochs", "tune.chat_template", "tune.lora"),
    "eval": ("eval.num_sequences", "eval.num_full_sequences", "eval.teacher", "eval.speculative"),
    "benchmarks": ("benchmarks.tasks", "benchmarks.backend", "benchmarks.limit", "benchmarks.batch_sequences"),
    "judge": ("judge.model", "judge.base_url", "judge.mode", "judge.questions", "judge.answers"),
    "": (
        "out",
        "device",
        "seeds",
        "corpus.sources",
        "teacher.path",
        "cache.recording",
        "cache.num_samples",
        "student.path",
        "train.learning_rate",
        "train.batch_sequences",
        "train.num_epochs",
        "reuse",
        "arms",
    ),
    "import": (
        "out",
        "tokenizer",
        "teacher",
        "format",
        "offset",
        "context",
        "seq_len",
        "long_rows",
        "top_k",
        "columns",
    ),
    "grid": (
        "out",
        "device",
        "seeds",
        "teachers",
        "students",
        "budgets",
        "alphas",
        "inits",
        "max_hours",
        "max_disk_gb",
    ),
}
_NUM_COMMON = 10


def help_text(parser: Parser, topic: str | None = None) -> str:
    """Return the text of `--help`, `--help SECTION` or `--help all`.

    Args:
        parser: parser of the command.
        topic: a section, a setting or `all`; None for the command's screen.

    Raises:
        SettingError: the topic is neither a section nor a setting.
    """
    if topic is None:
        return "\n".join(_screen(parser))
    if parser.record is None:
        raise SettingError("has no settings", where=parser.prog, found=f"--help {topic}", expected="--help alone")
    if topic == "all":
        return "\n".join(_all(parser.record))
    loc = tuple(topic.removeprefix("--").split("."))
    setting = find(parser.record, loc)
    if setting is None:
        meant = [f"--help {name}" for name in settings_like(parser.record, loc)]
        sections = ", ".join(s.name for s in children(parser.record) if s.section is not None)
        fix = did_you_mean(meant) or f"sections are {sections}"
        raise SettingError("no such section or setting", where=f"--help {topic}", fix=fix)
    return "\n".join(_section(setting))


def common(parser: Parser) -> list[str]:
    """Return the names of the settings that the command's screen shows."""
    if parser.record is None:
        return []
    names = [name for section in (*parser.sections, "") for name in COMMON[section]]
    known = [name for name in dict.fromkeys(names) if find(parser.record, tuple(name.split("."))) is not None]
    return known[:_NUM_COMMON]


def _screen(parser: Parser) -> Iterator[str]:
    yield f"usage: {parser.usage_line}"
    yield ""
    yield from _wrapped(parser.description or "", "")
    yield ""
    if parser.file is not None:
        yield from _row(f"  {parser.file}", "Path of the file, or the name of a shipped one; see capgap ls.")
    for action in parser.positionals:
        yield from _row(f"  {action.metavar or action.dest}", action.help or "")
    for action in parser.own_flags:
        words = " ".join([*action.option_strings, *([_value_name(action)] if action.nargs != 0 else [])])
        yield from _row(f"  {words}", action.help or "")
    yield from _row("  --help", "Show this text.")
    if parser.record is None:
        return
    yield ""
    yield "Settings that are set most often; a flag wins over the file:"
    for name in common(parser):
        setting = find(parser.record, tuple(name.split(".")))
        assert setting is not None
        first = setting.sentences.partition(". ")[0].rstrip(".")
        default = f" ({setting.default})" if setting.default else ""
        yield from _row(
            f"  --{name}", textwrap.shorten(first, _WIDTH - _COLUMN - len(default), placeholder=" ...") + default
        )
    yield ""
    sections = ", ".join(s.name for s in children(parser.record) if s.section is not None)
    yield from _wrapped(f"--help SECTION lists all settings of {sections}; --help all lists every one.", "")


def _value_name(action: argparse.Action) -> str:
    if action.metavar is not None:
        return str(action.metavar)
    return "N" if action.type in (number, integer) else action.dest.rpartition("_")[2].upper()


def _all(record: type[Record]) -> Iterator[str]:
    yield "Every setting, as a flag; in the file a dot is a section."
    for setting in children(record):
        if setting.section is None:
            yield from _entry(setting)
    for setting in children(record):
        if setting.section is not None:
            yield ""
            yield from _section(setting)


def _section(setting: Setting) -> Iterator[str]:
    """Yield the lines of a section with all its settings, or of one setting."""
    if setting.section is None:
        yield from _entry(setting)
        return
    yield from _wrapped(f"{setting.name}: {_of(setting)}", "")
    for inner in all_settings(setting.section, setting.loc):
        yield from _entry(inner)


def _of(setting: Setting) -> str:
    record = setting.section
    assert record is not None
    return setting.sentences or " ".join((record.__doc__ or "").split())


def _entry(setting: Setting) -> Iterator[str]:
    parts = [setting.kind, "needed" if setting.is_needed else f"default {setting.default}" if setting.default else ""]
    yield f"  --{setting.name}  ({'; '.join(part for part in parts if part)})"
    yield from _wrapped(setting.sentences, " " * 6)


def _row(left: str, text: str) -> Sequence[str]:
    """Return the lines of a name and its description, in two columns."""
    lines = textwrap.wrap(text, _WIDTH - _COLUMN) or [""]
    if len(left) > _COLUMN - 2:
        return [left, *(" " * _COLUMN + line for line in lines)]
    return [f"{left:<{_COLUMN}}{lines[0]}".rstrip(), *(" " * _COLUMN + line for line in lines[1:])]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
