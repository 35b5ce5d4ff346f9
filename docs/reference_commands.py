"""Write a page for each command: what it does, its flags, and the settings that are set most often with it.

mkdocs runs this script when it builds the site; the pages exist only there. Their texts are those of `--help`.
"""

from __future__ import annotations

from collections.abc import Iterator

import mkdocs_gen_files

from capgap.jobs.help import common
from capgap.jobs.registry import COMMANDS, Command
from capgap.jobs.settings import Setting, children, find


def command_page(command: Command) -> Iterator[str]:
    """Yield the lines of the page of one command."""
    parser = command.parser()
    yield f"# capgap {command.name}"
    yield ""
    yield f"{parser.description} In a line: {command.help}."
    yield ""
    yield f"```\n{parser.usage_line}\n```"
    yield ""
    yield "| argument | what it is |"
    yield "|---|---|"
    if parser.file is not None:
        yield f"| `{parser.file}` | Path of the file, or the name of a shipped one (`capgap ls` lists them). |"
    for action in parser.positionals:
        yield f"| `{action.metavar or action.dest}` | {_cell(action.help)} |"
    for action in parser.own_flags:
        yield f"| {', '.join(f'`{flag}`' for flag in action.option_strings)} | {_cell(action.help)} |"
    if parser.record is None:
        return
    yield ""
    yield "## Settings that are set most often"
    yield ""
    yield "Each is a flag, and a flag wins over the file. All others are in the [settings](../settings.md)."
    yield ""
    yield "| setting | default | what it is |"
    yield "|---|---|---|"
    for name in common(parser):
        setting = find(parser.record, tuple(name.split(".")))
        assert setting is not None
        yield f"| `--{name}` | {_default(setting)} | {_cell(setting.sentences)} |"
    sections = ", ".join(s.name for s in children(parser.record) if s.section is not None)
    yield ""
    yield f"`capgap {command.name} --help SECTION` shows all settings of {sections}."


def _default(setting: Setting) -> str:
    return "**needed**" if setting.is_needed else f"`{setting.default}`" if setting.default else ""


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


for one in COMMANDS.values():
    with mkdocs_gen_files.open(f"reference/commands/{one.name.replace(' ', '-')}.md", "w") as page:
        page.write("\n".join(command_page(one)) + "\n")
