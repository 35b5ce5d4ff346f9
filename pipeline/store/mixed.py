"""A stream of micro-batches that mixes several caches by weight.

    number of a step --cycle of 1000, ordered by the seed--> loader of that step --> its next micro-batches

In every cycle of 1000 steps, each loader gives its share of the steps, rounded to one in 1000, and its turns are spread
over the cycle. So the mix is exact over a cycle and off by no more than a few steps over a short stretch. Which loader
gives step s is a pure function of (seed, weights, s), whatever the ranks and the micro-batches. So the number of steps
that each loader has given follows from s, and the state is still one integer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from capgap.pipeline.store.batch import Batch
from capgap.pipeline.store.loader import SequenceLoader, another_pass
from capgap.schemas.errors import InputError

# Steps of a cycle: weights are rounded to a thousandth, and the mix is exact over a thousand steps.
_CYCLE = 1000


class MixedLoader:
    """Iterates over the remaining micro-batches of several caches; all micro-batches of a step are of one cache.

    Args:
        loaders: The loaders by name, all with the same rank, number of ranks and shape of batches. If the caches differ
            in sequence length, set `row_len` and `micro_batch` of the loaders so that the shapes agree. The loader of a
            cache that is read more than once needs that many epochs.
        weights: The weights by the same names, above 0; only their ratios count.
        seed: Seed of the order in which loaders take turns.
        max_tokens: Stop before the step that would exceed this many targets over all ranks. If it is None, the stream
            ends with the last step for which every loader has enough data.
        epochs_of: Name of the cache whose passes are counted as epochs; None for the first by name.

    Raises:
        InputError: The names differ, a weight is not above 0, the loaders differ in the shape of their batches or in
            their micro-batches in a step, or there is not enough data for one step.
    """

    def __init__(
        self,
        loaders: Mapping[str, SequenceLoader],
        weights: Mapping[str, float],
        seed: int,
        *,
        max_tokens: int | None = None,
        epochs_of: str | None = None,
    ) -> None:
        self._names = sorted(loaders)
        if not self._names or self._names != sorted(weights):
            raise InputError("weights", found=sorted(weights), expected=f"one for each of {self._names}")
        self._loaders = [loaders[name] for name in self._names]
        self._shares = _shares(self._names, weights)
        shapes = {loader.shape for loader in self._loaders}
        if len(shapes) > 1:
            raise InputError(
                "the caches differ in their batches' shapes (rows in a batch, targets in a row)",
                found=sorted(shapes),
                expected="one shape",
                fix="give the loaders the same row_len, and micro_batch so that they have as many rows",
            )
        rounds = {loader.rounds_per_step for loader in self._loaders}
        if len(rounds) > 1:
            raise InputError(
                "the caches differ in the number of micro-batches in a step",
                found=sorted(rounds),
                expected="one number",
                fix="give the loaders the same batch_sequences over micro_batch",
            )
        self._seed, self._position, self._rounds = seed, 0, rounds.pop()
        self._is_spent = False
        self._counted = self._names.index(self._names[0] if epochs_of is None else epochs_of)
        # rows of one micro-batch on all ranks; positions count rows because all caches have equally many
        self._rows = shapes.pop()[0] * self._loaders[0].settings.world_size
        self._sequences = np.array([loader.settings.batch_sequences for loader in self._loaders])
        self._tokens = np.array([loader.tokens_per_step for loader in self._loaders])
        self._turns = lru_cache(maxsize=2)(self._permute_turns)
        self._num_steps = self._most(max_tokens)
        if not self._num_steps:
            raise InputError("not enough data for one step of the mix", found=self._has.tolist(), expected="more")

    def __len__(self) -> int:
        """Micro-batches of the whole training on this rank."""
        return self._num_steps * self._rounds

    def __iter__(self) -> Iterator[Batch]:
        """Yield the remaining micro-batches; raise InputError if the last one was handed out already."""
        if self._is_spent:
            raise another_pass(len(self))
        streams = [iter(loader) for loader in self._loaders]
        try:
            while self._position < len(self):
                which = self._turn(self._position // self._rounds)
                batch = next(streams[which])
                is_last = self._position + 1 == len(self)
                if is_last:
                    # a loader checks by itself only before its own last batch, which the mix may not reach
                    for loader in self._loaders:
                        loader.require_sound()
                self._position, self._is_spent = self._position + 1, is_last
                yield batch
            self._is_spent = True
        finally:
            for stream in streams:
                stream.close()

    @property
    def num_steps(self) -> int:
        """Return the number of steps of the whole training."""
        return self._num_steps

    @property
    def steps_per_epoch(self) -> float:
        """Return the average number of steps in which the cache that counts epochs is read once."""
        own = self._loaders[self._counted].steps_per_epoch
        return own * float(self._shares.sum() / self._shares[self._counted])

    @property
    def num_tokens(self) -> int:
        """Return the number of targets of the whole training over all ranks, without padding."""
        return int(self._given(self._num_steps) @ self._tokens)

    @property
    def tokens_per_step(self) -> int:
        """Return the average number of targets of one step over all ranks, without padding."""
        return round(self.num_tokens / self.num_steps)

    @property
    def skipped(self) -> dict[str, int]:
        """Return the number of sequences in each damaged member that was skipped in any cache, by its name."""
        return {name: number for loader in self._loaders for name, number in loader.skipped.items()}

    def micro_batch(self, number: int) -> Batch:
        """Return this rank's micro-batch `number`, counted from 0 over the whole training."""
        loader, own = self._source(number)
        return loader.micro_batch(own)

    def names(self, number: int) -> list[str]:
        """Return the names in errors of the sequences of micro-batch `number`, if no member is damaged."""
        loader, own = self._source(number)
        return loader.names(own)

    def seq_len_of(self, number: int) -> int:
        """Return the number of targets in each sequence of micro-batch `number`."""
        return self._source(number)[0].seq_len

    def state_dict(self) -> dict[str, Any]:
        """Return the state: rows handed out over all ranks, the identity of the mix, and the states of the loaders."""
        states = {name: loader.state_dict() for name, loader in zip(self._names, self._loaders, strict=True)}
        return {"position": self._position * self._rows, **self._counts(), "loaders": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of a state.

        Raises:
            InputError: The state belongs to another mix or to another order of one of the caches, or stops within a
                micro-batch of all ranks.
        """
        found = {name: state.get(name) for name in self._counts()}
        if found != self._counts():
            raise InputError(
                "a checkpoint of another mix",
                found={name: value for name, value in found.items() if value != self._counts()[name]},
                expected={name: value for name, value in self._counts().items() if value != found[name]},
                fix="restore the caches, weights and batch it was made with, or start the stage over with --remake",
            )
        position, rest = divmod(int(state["position"]), self._rows)
        if rest:
            raise InputError(
                "a checkpoint within a step, which cannot be divided among these ranks",
                found=f"{state['position']} rows",
                expected=f"a multiple of {self._rows}, the rows of a micro-batch x ranks",
                fix="resume from one between two steps, or with the micro-batch and the ranks it was made with",
            )
        step, begun = divmod(position, self._rounds)
        given = self._given(step) * self._sequences
        if begun:
            which = self._turn(step)
            given[which] += begun * self._loaders[which].together
        for name, loader, number in zip(self._names, self._loaders, given, strict=True):
            loader.load_state_dict(state["loaders"][name] | {"position": int(number)})
        self._position, self._is_spent = position, False

    def _counts(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "shares": dict(zip(self._names, map(int, self._shares), strict=True)),
            "batch_sequences": dict(zip(self._names, map(int, self._sequences), strict=True)),
        }

    def _turn(self, step: int) -> int:
        """Return the index of the loader that gives a step."""
        cycle, turn = divmod(step, _CYCLE)
        return int(self._turns(cycle)[turn])

    def _given(self, step: int) -> npt.NDArray[np.int64]:
        """Return the number of steps that each loader gives before `step`."""
        cycle, turn = divmod(step, _CYCLE)
        return cycle * self._shares + np.bincount(self._turns(cycle)[:turn], minlength=len(self._shares))

    def _source(self, number: int) -> tuple[SequenceLoader, int]:
        """Return the loader that gives micro-batch `number` of the mix, and the number of the micro-batch in it."""
        step, part = divmod(number, self._rounds)
        which = self._turn(step)
        return self._loaders[which], int(self._given(step)[which]) * self._rounds + part

    def _most(self, max_tokens: int | None) -> int:
        """Return the number of steps for which there is data and which do not exceed `max_tokens`."""
        if max_tokens is not None:
            most = max_tokens // int(self._tokens.min())
            wanted = _largest(most, lambda step: int(self._given(step) @ self._tokens) <= max_tokens)
            short = self._given(wanted) > self._has
            if short.any():
                name = self._names[int(short.argmax())]
                raise InputError("a cache is too small for the mix", where=name, fix="give it more epochs")
            return wanted
        return _largest(int(self._has.sum()), lambda step: bool((self._given(step) <= self._has).all()))

    @property
    def _has(self) -> npt.NDArray[np.int64]:
        return np.array([loader.num_steps for loader in self._loaders])

    def _permute_turns(self, cycle: int) -> npt.NDArray[np.int64]:
        key = hashlib.blake2b(f"{self._seed}/mix/{cycle}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        # a loader with n turns gets a random one in each n-th of the cycle, so short stretches are close to the mix too
        at = [(np.arange(share) + generator.random(share)) / share for share in self._shares]
        turns: npt.NDArray[np.int64] = np.repeat(np.arange(len(self._shares)), self._shares)
        return turns[np.argsort(np.concatenate(at), kind="stable")]


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to `most` that fits, by bisection; every smaller number must fit too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _shares(names: list[str], weights: Mapping[str, float]) -> npt.NDArray[np.int64]:
    """Return each loader's number of turns in a cycle, in proportion to the weights; they sum to the cycle's length."""
    given = np.array([weights[name] for name in names], dtype=np.float64)
    if not (np.isfinite(given) & (given > 0)).all():
        raise InputError("weights", found=dict(weights), expected="numbers above 0")
    exact = given / given.sum() * _CYCLE
    shares: npt.NDArray[np.int64] = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: _CYCLE - int(shares.sum())]] += 1
    if not shares.all():
        raise InputError("weights", found=dict(weights), expected=f"none below one in {_CYCLE} of their sum")
    return shares
