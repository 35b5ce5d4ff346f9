"""The damaged members that a training skips, the number of their sequences, and the limit on the damage."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from types import MappingProxyType
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
        excused: Number of members of each shard in quarantine, by its name, as `ShardPlace.name_of` gives it. They do
            not count toward the limit, because their damage is already known.
    """

    def __init__(
        self,
        num_sequences: int,
        on_corrupt: Literal["stop", "skip"],
        excused: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._excused = excused
        self._said: set[str] = set()
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
            if member not in self._members:
                self._say(_shard_of(name), error)
            self._members[member] = (name, num_sequences)
            found = dict(self._members.values())
        # Members that an interrupted training skipped may have been repaired; what is still damaged is found again.
        counted = {name: count for name, count in found.items() if _shard_of(name) not in self._excused}
        if sum(counted.values()) > self._most:
            raise CorruptError(
                "too much is damaged to be skipped",
                where=name,
                found=f"{sum(counted.values())} sequences in {len(counted)} members",
                expected=f"at most {self._most}, 0.1 % of all",
                fix="delete the shards and rerun the stage that wrote them; the others are kept",
            ) from error

    def _say(self, shard: str, error: CorruptError) -> None:
        """Log a damaged member; of a shard in quarantine there is one line for all of its members."""
        if shard not in self._excused:
            _LOG.warning("skipped: %s", error)
        elif shard not in self._said:
            self._said.add(shard)
            text = "skipped: %s: the shard is in quarantine, with %d members; found %s"
            _LOG.warning(text, shard, self._excused[shard], error.found)

    def as_dict(self) -> dict[str, int]:
        """Return the number of sequences in each damaged member, by name, including those of a loaded state."""
        return self._earlier | dict(self._members.values())

    def load(self, skipped: dict[str, int]) -> None:
        """Load the skips of an interrupted training, to report them.

        Their members are read again, because they may have been repaired, and count only if they are damaged again.
        """
        self._earlier = dict(skipped)


def _shard_of(name: str) -> str:
    """Return the name of a member's shard."""
    return name.partition(", member ")[0]
