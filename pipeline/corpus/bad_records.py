"""Records that cannot be used: the first stops the corpus, or each is left out, counted and named."""

from __future__ import annotations

import logging
from typing import Literal, TypeVar

from capgap.schemas.base import Record
from capgap.schemas.errors import BadRecordError, InputError

_Error = TypeVar("_Error", bound=InputError)
_LOG = logging.getLogger("capgap")
NUM_NAMED = 20
"""Bad records that are named in the log where nothing else is said; all are counted."""


class BadTally(Record):
    """What a unit of the corpus found of records that cannot be used."""

    num_records: int
    """Records that were read, bad ones too."""

    num_bad: int
    """Of them."""

    named: tuple[str, ...]
    """What is wrong with the first ones."""


class BadRecords:
    """What becomes of records that cannot be used.

    Args:
        section: of the run file, for what is said.
        rule: `stop` at the first, or `skip` them.
        max_fraction: of all records; where more are bad, it is refused at the end.
        num_named: bad records that are named in the log.

    Attributes:
        num_records: that were read, bad ones too.
        num_bad: of them.
    """

    def __init__(
        self, section: str, rule: Literal["stop", "skip"], max_fraction: float, num_named: int = NUM_NAMED
    ) -> None:
        self.num_records = self.num_bad = 0
        self._section, self._rule, self._max_fraction = section, rule, max_fraction
        self._num_named = num_named
        self._named: list[str] = []

    def refuse(self, error: BadRecordError) -> None:
        """Take note of a bad record.

        Raises:
            BadRecordError: that one, where it stops the corpus.
        """
        error = in_section(error, self._section)
        if self._rule == "stop":
            raise error from None
        said = str(BadRecordError(error.what, where=error.where, found=error.found, expected=error.expected))
        self._leave_out(said)

    @property
    def tally(self) -> BadTally:
        """What was counted, to be added to that of other units."""
        return BadTally(num_records=self.num_records, num_bad=self.num_bad, named=tuple(self._named))

    def add(self, tally: BadTally) -> None:
        """Count what a unit found."""
        self.num_records += tally.num_records
        for said in tally.named:
            self._leave_out(said)
        self.num_bad += tally.num_bad - len(tally.named)

    def _leave_out(self, said: str) -> None:
        self.num_bad += 1
        if len(self._named) < NUM_NAMED:
            self._named.append(said)
            if len(self._named) <= self._num_named:
                _LOG.warning("left out record %d, %s", self.num_bad, said)

    def finish(self) -> None:
        """Say how many were left out.

        Raises:
            InputError: too many.
        """
        if not self.num_bad:
            return
        counted = f"{self.num_bad:,} of {self.num_records:,} records"
        if self.num_bad > self._max_fraction * self.num_records:
            raise InputError(
                "too many records cannot be used",
                where=f"{self._section}.sources",
                found=f"{counted}, first {self._named[0]}",
                expected=f"at most a share of {self._max_fraction:g}, {self._section}.max_bad_fraction",
                fix="mend the records, or raise the bound",
            )
        more = f", of which the first {self._num_named} are named above" if self.num_bad > self._num_named else ""
        if self._num_named:
            _LOG.warning("%s: left out %s that cannot be used%s", self._section, counted, more)


def in_section(error: _Error, section: str) -> _Error:
    """The error with the setting before its file, and with that section's settings in what to do about it."""
    before = f"{section}.sources: "
    if str(error.where).startswith(before):
        return error
    fix = None if error.fix is None else error.fix.replace("corpus.", f"{section}.")
    if fix is not None and section != "corpus":
        fix = fix.partition(", or leave it out")[0]
    return type(error)(error.what, where=f"{before}{error.where}", found=error.found, expected=error.expected, fix=fix)
