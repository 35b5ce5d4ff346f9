"""Handles records that cannot be used: the first one stops the stage, or each is left out, counted and named."""

from __future__ import annotations

import logging
from typing import Literal, TypeVar

from capgap.schemas.base import Record
from capgap.schemas.errors import BadRecordError, InputError

_Error = TypeVar("_Error", bound=InputError)
_LOG = logging.getLogger("capgap")
NUM_NAMED = 20
"""How many bad records are named in the log by default; all are counted."""


class BadTally(Record):
    """The records of one unit of the corpus that cannot be used."""

    num_records: int
    """Number of records that were read, including bad ones."""

    num_bad: int
    """Number of records that cannot be used."""

    named: tuple[str, ...]
    """Messages of the first bad records, at most `NUM_NAMED`."""


class BadRecords:
    """Counts the records that cannot be used, and stops at the first one or leaves them out.

    Args:
        section: the section of the run file that names the sources, for messages.
        rule: `stop` at the first bad record, or `skip` bad records.
        max_fraction: the largest share of all records that may be bad; `finish` refuses more.
        num_named: how many bad records are named in the log.

    Attributes:
        num_records: number of records that were read, including bad ones.
        num_bad: number of records that cannot be used.
    """

    def __init__(
        self, section: str, rule: Literal["stop", "skip"], max_fraction: float, num_named: int = NUM_NAMED
    ) -> None:
        self.num_records = self.num_bad = 0
        self._section, self._rule, self._max_fraction = section, rule, max_fraction
        self._num_named = num_named
        self._named: list[str] = []

    def refuse(self, error: BadRecordError) -> None:
        """Count a bad record, and log it.

        Raises:
            BadRecordError: the rule is `stop`; the error is the given one, with its section.
        """
        error = in_section(error, self._section)
        if self._rule == "stop":
            raise error from None
        said = str(BadRecordError(error.what, where=error.where, found=error.found, expected=error.expected))
        self._leave_out(said)

    @property
    def tally(self) -> BadTally:
        """The counts so far, which `add` takes together with those of other units."""
        return BadTally(num_records=self.num_records, num_bad=self.num_bad, named=tuple(self._named))

    def add(self, tally: BadTally) -> None:
        """Add the counts of a unit."""
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
        """Log how many records were left out.

        Raises:
            InputError: the share of bad records is larger than `max_fraction`.
        """
        if not self.num_bad:
            return
        counted = f"{self.num_bad:,} of {self.num_records:,} records"
        if self.num_bad > self._max_fraction * self.num_records:
            top = self._section.partition(".")[0]
            raise InputError(
                "too many records cannot be used",
                where=f"{self._section}.sources",
                found=f"{counted}, first {self._named[0]}",
                expected=f"at most a share of {self._max_fraction:g}, {top}.max_bad_fraction",
                fix=f"mend the records, or raise {top}.max_bad_fraction",
            )
        more = f", of which the first {self._num_named} are named above" if self.num_bad > self._num_named else ""
        if self._num_named:
            _LOG.warning("%s: left out %s that cannot be used%s", self._section, counted, more)


def in_section(error: _Error, section: str) -> _Error:
    """Return the error with `SECTION.sources` before its file, and with the settings of that section in its fix."""
    before = f"{section}.sources: "
    if str(error.where).startswith(before):
        return error
    # a part of a section has the settings of the whole
    top = section.partition(".")[0]
    fix = None if error.fix is None else error.fix.replace("corpus.", f"{top}.")
    if fix is not None and top != "corpus":
        fix = fix.partition(", or leave it out")[0]
    return type(error)(error.what, where=f"{before}{error.where}", found=error.found, expected=error.expected, fix=fix)
