"""The damaged members that a training skips, the number of their sequences, and the limit on the damage."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from typing import Literal

from capgap.schemas.errors import CorruptError

_LOG = logging.getLogger("capgap")

# A few bad sectors damage far less than one sequence in a thousand. More damage has a cause that must be mended.
_LARGEST_SHARE = 0.001


class Skips:
    """The damaged members found so far.

    Args:
        num_sequences: Number of sequences in the whole set.
        on_corrupt: `stop` raises at the first damaged member, `skip` when the damaged members found in this process
            hold more than 0.1 % of the sequences.
        excused: Names, as `ShardPlace.name_of` gives them, of shards whose members do not count toward the limit,
            because their damage is already known.
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
        """Record a damaged member as skipped.

        Raises:
            CorruptError: The member may not be skipped, or with it too many sequences would be skipped.
        """
        if not self._skip:
            raise error
        with self._lock:
            known = member in self._members
            self._members[member] = (name, num_sequences)
            found = dict(self._members.values())
        if not known:
            _LOG.warning("skipped: %s", error)
        # those of an interrupted training may have been repaired; what is still damaged is found again
        counted = {name: count for name, count in found.items() if name.partition(", member ")[0] not in self._excused}
        if sum(counted.values()) > self._most:
            raise CorruptError(
                "too much is damaged to be skipped",
                where=name,
                found=f"{sum(counted.values())} sequences in {len(counted)} members",
                expected=f"at most {self._most}, 0.1 % of all",
                fix="delete the shards and rerun the stage that wrote them; the others are kept",
            ) from error

    def as_dict(self) -> dict[str, int]:
        """Return the number of sequences in each damaged member, by name, including those of a loaded state."""
        return self._earlier | dict(self._members.values())

    def load(self, skipped: dict[str, int]) -> None:
        """Load the skips of an interrupted training, to report them.

        Their members are read again, because they may have been repaired, and count only if they are damaged again.
        """
        self._earlier = dict(skipped)
