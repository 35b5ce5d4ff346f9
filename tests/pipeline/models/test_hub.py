from __future__ import annotations

import socket

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from capgap.pipeline.models.hub import require_reached
from capgap.schemas.errors import MachineError


def _as_transformers_raises(cause: BaseException) -> OSError:
    """The chain in which transformers hands on what went wrong below it."""
    try:
        try:
            try:
                raise cause
            except OSError as error:
                raise LocalEntryNotFoundError("not in the cache") from error
        except LocalEntryNotFoundError as error:
            raise OSError("We couldn't connect to the hub") from error
    except OSError as error:
        return error


def test_a_refused_connection_is_the_network_s_fault() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = closed.getsockname()
    with pytest.raises(ConnectionRefusedError) as refused:
        socket.create_connection(address)
    with pytest.raises(MachineError, match=r"a/model: cannot be fetched: the network fails; found .* refused"):
        require_reached("a/model", _as_transformers_raises(refused.value))


def test_a_host_without_an_address_is_the_network_s_fault() -> None:
    with pytest.raises(MachineError, match="name resolution"):
        require_reached("a/model", _as_transformers_raises(socket.gaierror(-3, "Temporary failure in name resolution")))


@pytest.mark.parametrize("cause", [OfflineModeIsEnabled("offline"), FileNotFoundError("config.json")])
def test_a_model_that_is_not_here_by_choice_or_by_name_is_not(cause: OSError) -> None:
    require_reached("a/model", _as_transformers_raises(cause))
