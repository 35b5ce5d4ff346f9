"""Micro-batches of a shard set, in an order that a single integer resumes.

The stream of a training is epoch after epoch of `EpochOrder`, cut into micro-batches; sequences that do not fill a
whole step on every rank at the end of an epoch are left out of it, so that the size of a micro-batch changes nothing
else. Rank r of w reads every w-th micro-batch from r on,
so all ranks take equally many steps and the position is the same number on each of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from capgap.pipeline.store.batch import Batch, collate
from capgap.pipeline.store.order import EpochOrder
from capgap.pipeline.store.reader import ShardReader
from capgap.schemas.errors import InputError
from capgap.schemas.records import Sequences, Targets

# 64 members of 8k tokens mix half a million tokens; decoded they take about 100 MB at 20 ids a token.
_WINDOW_MEMBERS = 64


class SequenceLoader:
    """Iterates over the micro-batches that remain, and counts what it has handed out.

    Args:
        reader: of the shards.
        micro_batch: sequences in a micro-batch.
        num_micro_batches: to hand out over all epochs and ranks; more than an epoch holds means further epochs.
        seed: of the order.
        rank: of this process.
        world_size: number of processes; must divide `num_micro_batches`.
        accumulate: micro-batches of one step on one rank.

    Raises:
        InputError: the set holds too few sequences for one step on every rank.
    """

    def __init__(
        self,
        reader: ShardReader,
        micro_batch: int,
        num_micro_batches: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        self._reader, self._micro_batch, self._seed = reader, micro_batch, seed
        self._rank, self._world_size = rank, world_size
        self._sizes = [member.num_sequences for _, member in reader.members]
        self._total = num_micro_batches
        self._per_epoch = micro_batches_per_epoch(sum(self._sizes), micro_batch, world_size * accumulate)
        self._position = 0
        self._decoded: OrderedDict[int, tuple[Sequences, Targets | None]] = OrderedDict()

    def __len__(self) -> int:
        return self._total // self._world_size

    def __iter__(self) -> Iterator[Batch]:
        while self._position < self._total:
            number = self._position + self._rank
            self._position += self._world_size
            yield self.micro_batch(number)

    def micro_batch(self, number: int) -> Batch:
        """Micro-batch `number` of the whole training, over all ranks."""
        epoch, within = divmod(number, self._per_epoch)
        order = self._order(epoch)
        start = within * self._micro_batch
        samples = [(*self._block(member), row) for member, row in order.locate(start, start + self._micro_batch)]
        return collate(samples, self._reader.codec.num_ids)

    def state_dict(self) -> dict[str, Any]:
        """The number of micro-batches handed out over all ranks, and what it counts."""
        return {"position": self._position, **self._order_settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that many micro-batches.

        Raises:
            InputError: the state counts micro-batches of another size or order.
        """
        expected = self._order_settings()
        found = {name: state.get(name) for name in expected}
        if found != expected or state["position"] % self._world_size:
            raise InputError(
                "a checkpoint of another data order",
                found=state,
                expected=expected,
                fix="restore micro_batch_sequences and the number of processes, or start over with --force",
            )
        self._position = int(state["position"])

    def _order_settings(self) -> dict[str, int]:
        # the number of ranks decides where an epoch is cut, and so what follows it
        return {"micro_batch": self._micro_batch, "seed": self._seed, "per_epoch": self._per_epoch}

    def _order(self, epoch: int) -> EpochOrder:
        if getattr(self, "_order_epoch", None) != epoch:
            self._order_epoch = epoch
            self._order_now = EpochOrder(self._sizes, self._seed, epoch, _WINDOW_MEMBERS)
        return self._order_now

    def _block(self, member: int) -> tuple[Sequences, Targets | None]:
        if member not in self._decoded:
            self._decoded[member] = self._reader.read(member)
            if len(self._decoded) > 2 * _WINDOW_MEMBERS:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(member)
        return self._decoded[member]


def micro_batches_per_epoch(num_sequences: int, micro_batch: int, together: int = 1) -> int:
    """Micro-batches of one epoch over all ranks, a multiple of the number that is taken `together` in one step.

    Raises:
        InputError: not even one.
    """
    number = num_sequences // (micro_batch * together) * together
    if not number:
        raise InputError(
            "too few sequences for one step",
            found=f"{num_sequences} sequences",
            expected=f"at least {micro_batch * together}",
            fix="give the corpus more text or lower the batch",
        )
    return number
