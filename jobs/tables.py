"""Prints tables on stdout: as wide as the terminal, or with a fixed width if stdout is a pipe or file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from capgap.schemas.printable import printable

# wide, because a cut text could hide what a script looks for
_WIDTH_OFF_A_TERMINAL = 200


def print_wide(table: RenderableType) -> None:
    """Print a table, as wide as the terminal, or 200 columns wide if stdout is none."""
    console = ResultConsole()
    ResultConsole(width=console.width if console.is_terminal else _WIDTH_OFF_A_TERMINAL).print(table)


class ResultConsole(Console):
    """rich's console, but text in a table cannot control the terminal, and a broken pipe is an exception."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render like rich, with control characters in texts replaced and rich's own control segments kept."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def on_broken_pipe(self) -> NoReturn:
        """Raise BrokenPipeError, because rich would end the process with exit code 1."""
        raise BrokenPipeError
