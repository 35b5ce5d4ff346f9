"""What failed when a model or tokenizer could not be fetched: its name, or the network."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from huggingface_hub.errors import OfflineModeIsEnabled

from capgap.schemas.errors import MachineError


def require_reached(name: str, error: BaseException) -> None:
    """Raise MachineError if `error` comes from a network that failed; a name that nobody has is no such thing.

    Whoever set HF_HUB_OFFLINE wants what is on this machine, and nothing failed where that is not there.
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


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
