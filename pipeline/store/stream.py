"""The stream of a training: which sequences each micro-batch holds, and a position that is one integer.

    number of a micro-batch --epoch, indices of this rank--> Order --> places

A step takes the next `batch_sequences` sequences of the order, over all ranks. Rank r of w takes every w-th of them,
starting at r, a micro-batch at a time. The sequences at the end of an epoch that do not fill a step are left out of
this epoch; each epoch leaves out different ones.
"""

from __future__ import annotations

import hashlib
from typing import Any

from capgap.pipeline.store.loader_settings import LoaderSettings
from capgap.pipeline.store.order import Order, Place
from capgap.pipeline.store.rows import sequences_per_row
from capgap.schemas.errors import InputError
from capgap.schemas.manifest import ShardSet


class Stream:
    """The sequences of a whole training on one rank, and the position in it.

    Args:
        shard_set: Description of the shards.
        settings: Settings of the loader.

    Attributes:
        order: Order of the sequences.
        steps_per_epoch: Number of whole steps in one pass over the data.
        num_steps: Number of steps of the whole training.
        position: Number of sequences handed out so far, over all ranks.

    Raises:
        InputError: The set holds too few sequences for one step, the micro-batches of all ranks do not divide a step,
            or sequences do not fit into the rows.
    """

    def __init__(self, shard_set: ShardSet, settings: LoaderSettings) -> None:
        self._shard_set, self._settings = shard_set, settings
        self.order = Order(
            [shard.num_sequences for shard in shard_set.shards],
            lambda shard: shard_set.shards[shard].members.num_sequences,
            shard_set.num_members,
            settings.seed,
            settings.lanes,
        )
        _require_divisible(shard_set.seq_len, settings)
        self.steps_per_epoch = len(self.order) // settings.batch_sequences
        self.num_steps = _num_steps(shard_set, settings, self.steps_per_epoch * settings.num_epochs)
        self.position = 0

    def __len__(self) -> int:
        """Return the number of micro-batches of the whole training on this rank."""
        return self.num_steps * self._settings.batch_sequences // self._settings.round_sequences

    def remaining(self) -> range:
        """Return the numbers of the remaining micro-batches."""
        return range(self.position // self._settings.round_sequences, len(self))

    def advance(self) -> None:
        """Move the position forward by one micro-batch on every rank."""
        self.position += self._settings.round_sequences

    def chosen(self, number: int) -> tuple[int, range]:
        """Return the epoch of this rank's micro-batch `number`, and its sequences' indices in the epoch's order."""
        together, settings = self._settings.round_sequences, self._settings
        epoch, start = divmod(number * together, self.steps_per_epoch * settings.batch_sequences)
        return epoch, range(start + settings.rank, start + together, settings.world_size)

    def places(self, number: int) -> list[Place]:
        """Return the places of the sequences of micro-batch `number`, if no member is damaged."""
        epoch, chosen = self.chosen(number)
        return [self.order.locate(epoch, index) for index in chosen]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and everything that determines which sequence it means."""
        return {"position": self.position, **self._counts()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of a state.

        Raises:
            InputError: The state belongs to another order, or stops within a micro-batch of all ranks.
        """
        expected = self._counts()
        found = {name: state.get(name) for name in expected}
        if found != expected:
            raise InputError(
                "a checkpoint of another data order",
                found={name: value for name, value in found.items() if value != expected[name]},
                expected={name: value for name, value in expected.items() if value != found[name]},
                fix="restore the settings and the data it was made with, or start the stage over with --remake",
            )
        if state["position"] % self._settings.round_sequences:
            raise InputError(
                "a checkpoint within a step, which cannot be divided among these ranks",
                found=f"{state['position']} sequences",
                expected=f"a multiple of {self._settings.round_sequences}, micro_batch x ranks",
                fix="resume from one between two steps, or with the micro-batch and the ranks it was made with",
            )
        self.position = int(state["position"])

    def _counts(self) -> dict[str, Any]:
        digests = "".join(shard.file.sha256 for shard in self._shard_set.shards)
        return {
            "batch_sequences": self._settings.batch_sequences,
            "seed": self._settings.seed,
            "lanes": self.order.lanes,
            "window": self.order.window,
            "shards": hashlib.sha256(digests.encode()).hexdigest(),
        }


def _require_divisible(seq_len: int, settings: LoaderSettings) -> None:
    per_row = sequences_per_row(settings.row_len or seq_len, seq_len)
    if settings.rank_sequences % per_row:
        raise InputError(
            "a micro-batch does not fill its rows",
            found=f"{settings.rank_sequences} sequences, {per_row} a row",
            expected=f"a multiple of {per_row}",
            fix="use another micro-batch or row_len",
        )
    if settings.batch_sequences % settings.round_sequences:
        raise InputError(
            "a step does not divide into micro-batches",
            found=f"{settings.batch_sequences} sequences, {settings.rank_sequences} a micro-batch on "
            f"{settings.world_size} ranks",
            expected=f"a multiple of {settings.round_sequences}",
            fix="set micro_batch_sequences to a divisor of a rank's share of batch_sequences",
        )


def _num_steps(shard_set: ShardSet, settings: LoaderSettings, most: int) -> int:
    """Return the number of steps of a training.

    Raises:
        InputError: There is not enough data, or `max_tokens` is too small, for one step.
    """
    if not most:
        raise InputError(
            "too few sequences for one step",
            found=f"{shard_set.num_sequences} sequences",
            expected=f"at least {settings.batch_sequences}",
            fix="give the corpus more text or lower the batch",
        )
    step_tokens = settings.batch_sequences * shard_set.seq_len
    steps = most if settings.max_tokens is None else min(most, settings.max_tokens // step_tokens)
    if not steps:
        raise InputError(
            "not enough data for one step of training",
            where="max_tokens",
            found=settings.max_tokens,
            expected=f"at least {step_tokens}, the targets of batch_sequences",
        )
    return steps
