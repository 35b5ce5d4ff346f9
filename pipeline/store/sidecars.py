"""Sidecars: small records about finished files, each with its own digest. A damaged sidecar is treated as missing.

A sidecar is one JSON object. Its `sha256` is the digest of the bytes of `record`, exactly as they stand in the file, so
that no changed value is ever read as a valid one.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from capgap.pipeline.store.files import atomic_file
from capgap.schemas.base import Entry

_LOG = logging.getLogger("capgap")

_LAYOUT = re.compile(rb'\{"sha256":"([0-9a-f]{64})","record":(.*)\}', re.DOTALL)

AnyRecord = TypeVar("AnyRecord", bound=Entry)


def write_sidecar(path: Path, record: Entry) -> None:
    """Write a record with its digest; afterwards, the file is complete on the disk or does not exist."""
    body = record.model_dump_json().encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    # `write_atomically` would list the folder, which may hold many thousands of sidecars
    with atomic_file(path) as file:
        file.write(b'{"sha256":"' + digest + b'","record":' + body + b"}")


def read_sidecar(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    """Read a record; return None if there is none, or if it is damaged, which is logged as a warning."""
    try:
        found = _LAYOUT.fullmatch(path.read_bytes())
        if found is not None and hashlib.sha256(found[2]).hexdigest().encode() == found[1]:
            return kind.model_validate_json(found[2])
    except FileNotFoundError:
        return None
    except ValidationError:
        pass
    _LOG.warning("%s is damaged: the file that it describes is made again", path)
    return None
