"""Text that is no UTF-8, in one sentence for all kinds of files."""

from __future__ import annotations

from typing import TypeVar

from capgap.schemas.errors import InputError

_Error = TypeVar("_Error", bound=InputError)
_WIDE = (b"\xff\xfe", b"\xfe\xff")


def not_utf8(error: UnicodeDecodeError, where: str, kind: type[_Error]) -> _Error:
    """What is said of bytes that cannot be decoded.

    Args:
        error: as decoding raised it.
        where: file and place.
        kind: BadRecordError where what comes after them can be read.
    """
    is_wide = error.object[:2] in _WIDE
    return kind(
        "not valid UTF-8",
        where=where,
        found=f"0x{error.object[error.start]:02x}" + (", the byte-order mark of UTF-16" if is_wide else ""),
        expected="UTF-8",
        fix=f"convert the file, for example with `iconv {'-f utf-16 ' if is_wide else ''}-t utf-8`",
    )
