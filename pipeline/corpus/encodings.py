"""The error for text that is no UTF-8, the same for all kinds of files."""

from __future__ import annotations

from typing import TypeVar

from capgap.schemas.errors import InputError

_Error = TypeVar("_Error", bound=InputError)
_WIDE = (b"\xff\xfe", b"\xfe\xff")


def not_utf8(error: UnicodeDecodeError, where: str, kind: type[_Error]) -> _Error:
    """Return the error for bytes that cannot be decoded.

    Args:
        error: the error that decoding raised.
        where: the file, and the place in it.
        kind: the class of the error: BadRecordError if the records behind these bytes can be read, else InputError.
    """
    is_wide = error.object[:2] in _WIDE
    return kind(
        "not valid UTF-8",
        where=where,
        found=f"0x{error.object[error.start]:02x}" + (", the byte-order mark of UTF-16" if is_wide else ""),
        expected="UTF-8",
        fix=f"convert the file, for example with `iconv {'-f utf-16 ' if is_wide else ''}-t utf-8`",
    )
