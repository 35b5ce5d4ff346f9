"""Tables on stdout: as wide as the terminal, in whole lines for a pipe, and no traceback where nobody reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from capgap.schemas.printable import printable

# an ellipsis would hide what a script looks for
_WIDTH_OFF_A_TERMINAL = 200


def print_wide(table: RenderableType) -> None:
    """Print a table."""
    console = ResultConsole()
    ResultConsole(width=console.width if console.is_terminal else _WIDTH_OFF_A_TERMINAL).print(table)


class ResultConsole(Console):
    """rich's console: no text in a table controls the terminal, and the command decides what a gone reader means."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Its segments, printable but for rich's own controls."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def on_broken_pipe(self) -> NoReturn:
        """Raise BrokenPipeError; rich would end the process with the code of a crash."""
        raise BrokenPipeError
