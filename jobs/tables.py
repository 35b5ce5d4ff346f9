"""Tables on stdout: as wide as the terminal, in whole lines for a pipe, and no traceback where nobody reads them."""

from __future__ import annotations

from typing import NoReturn

from rich.console import Console, RenderableType

# an ellipsis would hide what a script looks for
_WIDTH_OFF_A_TERMINAL = 200


def print_wide(table: RenderableType) -> None:
    """Print a table."""
    console = ResultConsole()
    ResultConsole(width=console.width if console.is_terminal else _WIDTH_OFF_A_TERMINAL).print(table)


class ResultConsole(Console):
    """rich's console, which leaves it to the command what happens when the reader has gone."""

    def on_broken_pipe(self) -> NoReturn:
        """Raise BrokenPipeError; rich would end the process with the code of a crash."""
        raise BrokenPipeError
