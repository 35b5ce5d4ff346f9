"""Tell why a model or tokenizer could not be fetched: because of its name, or because of the network."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from capgap.schemas.errors import InputError, MachineError


def require_reached(name: str, error: BaseException) -> None:
    """Raise MachineError if `error` comes from a network that failed, and not from a name that does not exist.

    With HF_HUB_OFFLINE set, a model that is not on this machine is no failure of the network.
    """
    causes = list(_causes(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return
    for cause in causes:
        if isinstance(cause, (ConnectionError, TimeoutError, socket.gaierror)):
            raise MachineError(
                "cannot be fetched: the network fails",
                where=name,
                found=str(cause) or type(cause).__name__,
                fix="run the same command again, or name a folder on this machine",
            ) from None


def not_there(what: str, path: str | Path, error: BaseException, file: str) -> InputError:
    """Return the error for a model or tokenizer that cannot be found.

    Args:
        what: the fault in a few words.
        path: folder or id, as the user gave it.
        error: the error that its loading raised.
        file: file that a folder should hold.
    """
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None
    found = (str(error).strip() or type(error).__name__).splitlines()[0].partition(": \n")[0].rstrip(" :.")
    fix = None
    if Path(path).exists():
        found = found if Path(path).is_dir() else "a file"
    elif not is_id:
        found, fix = "no such folder", "check the path" + ("" if Path(path).is_absolute() else f", from {Path.cwd()}")
    elif any(isinstance(cause, GatedRepoError) for cause in _causes(error)):
        found = "a gated model that you have no access to"
        fix = "ask for access on its page and log in with `hf auth login`, or name a folder"
    elif any(isinstance(cause, RepositoryNotFoundError) for cause in _causes(error)):
        found = "no such folder, and no id that the hub knows or that you may read"
        fix = "check the name; for a private or gated model log in with `hf auth login`"
    elif constants.HF_HUB_OFFLINE:
        found = "no such folder, and nothing is downloaded while HF_HUB_OFFLINE is set"
        fix = f"download it first with `hf download {path}`, or name a folder"
    return InputError(
        what,
        where=path,
        found=found,
        expected=f"a Hugging Face folder with {file}, or an id that can be downloaded",
        fix=fix,
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
