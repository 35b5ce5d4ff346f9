"""Write the page of messages: the text of every error that a user can see, with what to do, taken from the code.

mkdocs runs this script when it builds the site; the page exists only there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import mkdocs_gen_files

from capgap.schemas import errors

_ROOT = Path(__file__).parents[1]
_CODES = {
    name: kind.exit_code
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.CapgapError)
}
_INTRODUCTION = """# Messages

This page lists every message with which a command can refuse, by the part of capgap that gives it. Dots stand for the
parts that differ from case to case. A message continues with what was found and what was expected. The exit code says
who can fix it: 2 you, 3 the machine, 4 means damaged data.

[Troubleshooting](../troubleshooting.md) explains the most common ones.
"""


def messages(file: Path) -> Iterator[tuple[str, int, str]]:
    """Yield text, exit code and advice of each error that the file raises."""
    for call in ast.walk(ast.parse(file.read_text())):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in _CODES and call.args:
            fix = next((keyword.value for keyword in call.keywords if keyword.arg == "fix"), None)
            for what in _texts(call.args[0]):
                yield what, _CODES[call.func.id], " *or* ".join(map(_plain, _texts(fix)))


def _texts(node: ast.expr | None) -> list[str]:
    """Return the texts that an expression can have, as far as the code shows them, with dots for inserted values."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=values):
            return ["".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in values)]
        case ast.IfExp(body=body, orelse=orelse):
            return [*_texts(body), *_texts(orelse)]
        case ast.BoolOp(values=values):
            return [text for value in values for text in _texts(value)]
    return []


def _page() -> Iterator[str]:
    yield _INTRODUCTION
    by_part: dict[str, set[tuple[str, int, str]]] = {}
    for layer in ("jobs", "schemas", "kernels", "pipeline"):
        for file in sorted((_ROOT / layer).rglob("*.py")):
            parts = file.relative_to(_ROOT).parts
            part = parts[1] if layer == "pipeline" and len(parts) > 2 else layer
            by_part.setdefault(part, set()).update(messages(file))
    for part, found in by_part.items():
        if not found:
            continue
        yield f"## {part}\n"
        yield "| message | exit code | what to do |"
        yield "|---|---|---|"
        for what, code, fix in sorted(found):
            yield f"| {_plain(what)} | {code} | {fix} |"
        yield ""


def _plain(text: str) -> str:
    """Escape Markdown in a text, except code between backticks."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    parts[::2] = [re.sub(r"([\\*_>\[\]])(?!\|)", r"\\\1", part.replace("<", "&lt;")) for part in parts[::2]]
    return "`".join(parts)


with mkdocs_gen_files.open("reference/messages.md", "w") as page:
    page.write("\n".join(_page()))
