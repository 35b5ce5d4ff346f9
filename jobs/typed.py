"""What is typed after a command: no credential, for a command line is written into manifests and shown by `ps`."""

from __future__ import annotations

from collections.abc import Sequence

from capgap.schemas.errors import SettingError
from capgap.schemas.secrets import require_no_credential


def refuse_credentials(arguments: Sequence[str]) -> None:
    """Refuse a command line with a credential in it.

    Raises:
        SettingError: there is one. The error names the flag before it, and repeats nothing.
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
        # of a flag that takes several words, as of `--heldout`, each is looked at
        flag = name
