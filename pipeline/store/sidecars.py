"""Small records about files that are finished, each with a digest of itself: a damaged one is as good as none.

A sidecar is one JSON object: `sha256` is the digest of the bytes of `record`, exactly as they stand in the file. So no
change of a value, however small, is read as another value.
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
    """Write a record with its digest; the file is whole and on the disk, or it is not there."""
    body = record.model_dump_json().encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    # not `write_atomically`, which lists the folder: there may be many thousands of sidecars in it
    with atomic_file(path) as file:
        file.write(b'{"sha256":"' + digest + b'","record":' + body + b"}")


def read_sidecar(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    """The record that was written; None where there is none, or where it is damaged, which is logged."""
    try:
        found = _LAYOUT.fullmatch(path.read_bytes())
        if found is not None and hashlib.sha256(found[2]).hexdigest().encode() == found[1]:
            return kind.model_validate_json(found[2])
    except FileNotFoundError:
        return None
    except ValidationError:
        pass
    _LOG.warning("%s is damaged: what it speaks of is made again", path)
    return None
