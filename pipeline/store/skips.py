"""Damaged members that are skipped: which, why, how many sequences, and when it is too much."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from typing import Literal

from capgap.schemas.errors import CorruptError

_LOG = logging.getLogger("capgap")

# What is lost to a few bad sectors is far below one in a thousand; more is a fault to be mended, not skipped.
_LARGEST_SHARE = 0.001


class Skips:
    """The damaged members met so far.

    Args:
        num_sequences: in the whole set.
        on_corrupt: `stop` raises at the first, `skip` when they hold more than 0.1 % of the sequences.
        excused: shards, as `ShardPlace.name_of` names them, whose members do not count: somebody has seen to them.
    """

    def __init__(self, num_sequences: int, on_corrupt: Literal["stop", "skip"], excused: Collection[str] = ()) -> None:
        self._excused = frozenset(excused)
        self._most = int(num_sequences * _LARGEST_SHARE) if on_corrupt == "skip" else 0
        self._skip = on_corrupt == "skip"
        self._lock = threading.Lock()
        self._members: dict[tuple[int, int], tuple[str, int]] = {}
        self._earlier: dict[str, int] = {}

    def __contains__(self, member: tuple[int, int]) -> bool:
        return member in self._members

    def note(self, member: tuple[int, int], name: str, num_sequences: int, error: CorruptError) -> None:
        """Remember a damaged member.

        Raises:
            CorruptError: it may not be skipped, or with it too much would be.
        """
        if not self._skip:
            raise error
        with self._lock:
            known = member in self._members
            self._members[member] = (name, num_sequences)
            skipped = self.as_dict()
        if not known:
            _LOG.warning("skipped: %s", error)
        counted = {
            name: count for name, count in skipped.items() if name.partition(", member ")[0] not in self._excused
        }
        if sum(counted.values()) > self._most:
            raise CorruptError(
                "too much is damaged to be skipped",
                where=name,
                found=f"{sum(counted.values())} sequences in {len(counted)} members",
                expected=f"at most {self._most}, 0.1 % of all",
                fix="delete the shards and rerun the stage that wrote them; the others are kept",
            ) from error

    def as_dict(self) -> dict[str, int]:
        """Sequences in each damaged member, by its name, those of an interrupted training included."""
        return self._earlier | dict(self._members.values())

    def load(self, skipped: dict[str, int]) -> None:
        """What an interrupted training had skipped; it is read, and found damaged or mended, anew."""
        self._earlier = dict(skipped)
