"""Refuses credentials on the command line, because it is written into manifests and shown by `ps`."""

from __future__ import annotations

from collections.abc import Sequence

from capgap.schemas.errors import SettingError
from capgap.schemas.secrets import require_no_credential


def refuse_credentials(arguments: Sequence[str]) -> None:
    """Refuse a command line with a credential in it.

    Raises:
        SettingError: it contains one. The error names the flag and does not repeat the value.
    """
    flag = ""
    for word in arguments:
        name, _, value = word.partition("=") if word.startswith("--") else (flag, "", word)
        try:
            require_no_credential(name.removeprefix("--") or "the command line", value)
            require_no_credential("the command line", name if word.startswith("--") else "")
        except ValueError as error:
            where, _, what = str(error).partition(": ")
            raise SettingError(what, where=f"--{where}" if name else where) from None
        # remember the flag, so that each word of a flag with several words, such as `--heldout`, is checked
        flag = name
