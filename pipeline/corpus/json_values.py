"""Reads the records of a JSON file piece by piece: the entries of one list, or values one after another."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

from capgap.pipeline.corpus.encodings import not_utf8
from capgap.schemas.errors import InputError

_PIECE_BYTES = 1 << 18
# No word of JSON is longer: the longest are -Infinity and the two escapes of a surrogate pair.
_LONGEST_WORD = 16
_BLANK = " \t\n\r"


def json_values(stream: BinaryIO, name: str) -> Iterator[tuple[str, object]]:
    """Yield each value of the stream with its place, which is `name` and the value's number.

    Raises:
        InputError: the stream holds something that is no JSON; the values behind it cannot be found either.
    """
    text = _Text(stream, name)
    is_list = text.next_is("[")
    for number in range(1 << 62):
        if is_list and number and not text.next_is(","):
            break
        following = text.peek()
        if following == "" or (is_list and following == "]" and not number):
            break
        yield f"{name}#{number}", text.value()
    if is_list and not text.next_is("]"):
        raise text.refusal("the list does not end", text.peek() or "the end of the file", "a comma or ]")
    if text.peek():
        raise text.refusal(
            "something follows the list", text.peek(), "the end of the file", "name it .jsonl if each line is a record"
        )


class _Text:
    """The text of a stream, of which only the part that is not parsed yet is held."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name = stream, name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._place, self._num_before, self._is_whole = "", 0, 0, False

    def peek(self) -> str:
        """Return the next character that is not blank, without taking it; an empty string at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in _BLANK:
                self._place += 1
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def next_is(self, character: str) -> bool:
        """Return whether the character is next, and take it if so."""
        found = self.peek() == character
        self._place += found
        return found

    def value(self) -> object:
        """Parse and return the next value.

        While the value is incomplete, each new attempt doubles the text, so that a long value is not slow.
        """
        while True:
            try:
                value, end = self._parse(self._text, self._place)
            except RecursionError:
                raise self.refusal(
                    "lists or objects are nested too deeply", "more than can be read", "fewer levels"
                ) from None
            except ValueError as error:
                if not self._may_go_on(error) or not self._more(len(self._text) - self._place):
                    raise self.refusal("not JSON", error, "a record") from None
                continue
            # a number at the end of the text may continue in the next piece
            if end == len(self._text) and self._more():
                continue
            self._place = end
            return value

    def _may_go_on(self, error: ValueError) -> bool:
        """Return whether more of the file may mend the error: it is at the end of the text, or in an open string."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated") or error.pos > len(self._text) - _LONGEST_WORD

    def refusal(self, what: str, found: object, expected: str, fix: str | None = None) -> InputError:
        """Return an error that names the current place in the file."""
        where = f"{self._name}, character {self._num_before + self._place}"
        return InputError(what, where=where, found=found, expected=expected, fix=fix)

    def _more(self, at_least: int = 0) -> bool:
        if self._is_whole:
            return False
        data = self._stream.read(max(_PIECE_BYTES, at_least))
        self._is_whole = not data
        self._num_before += self._place
        try:
            self._text, self._place = self._text[self._place :] + self._decode.decode(data, final=not data), 0
        except UnicodeDecodeError as error:
            raise not_utf8(error, self._name, InputError) from None
        return True
