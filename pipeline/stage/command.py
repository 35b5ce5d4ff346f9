"""The command that the user typed, also in the processes that a driver or a launcher starts for it.

The command lines of such processes name temporary files that are gone afterwards, so nobody could run them again.
"""

from __future__ import annotations

import os
import shlex
import sys

_VARIABLE = "CAPGAP_COMMAND"


def typed_command() -> list[str]:
    """Return the words of the command that the user typed, which this process or its driver carries out."""
    return shlex.split(os.environ[_VARIABLE]) if _VARIABLE in os.environ else list(sys.argv)


def handed_on() -> dict[str, str]:
    """Return the environment variable by which a process that is started for this command learns of it."""
    return {_VARIABLE: shlex.join(typed_command())}
