"""Several caches as one stream of micro-batches, by weight.

    number of a step --cycle of 1000, ordered by the seed--> which loader gives its micro-batches --> that one's next

In every cycle each loader gives its share, to one in 1000, and its turns are spread over it, so the mix is exact over
any long stretch, and off by no more than a few steps over a short one. Which loader gives step s is a pure function of
(seed, weights, s), so how much each has given follows from s, whatever the ranks and the micro-batches, and the state
is still one integer.
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

# Weights are kept to a thousandth; over a thousand steps the mix is exact.
_CYCLE = 1000


class MixedLoader:
    """Iterates over the micro-batches that remain, those of a step of one cache.

    Args:
        loaders: by name, of the same rank and ranks, and with batches of one shape; where the sequences of caches
            differ in length, `row_len` and `micro_batch` of the loaders give them one. A cache that is to be read more
            than once needs its epochs.
        weights: by the same names, above 0; only their ratios count.
        seed: of the order in which loaders take turns.
        max_tokens: stop before the step that would pass this many targets over all ranks; left out, the stream ends
            with the last whole step that every loader has enough for.
        epochs_of: the cache whose passes are counted as epochs; left out, the first by name.

    Raises:
        InputError: the names differ, a weight is not above 0, the batches are not of one shape, steps not of equally
            many, or not even one step can be filled.
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
                "rows in a batch, and targets in a row",
                found=sorted(shapes),
                expected="one shape",
                fix="give the loaders the same row_len, and micro_batch so that they have as many rows",
            )
        rounds = {loader.rounds_per_step for loader in self._loaders}
        if len(rounds) > 1:
            raise InputError(
                "micro-batches in a step",
                found=sorted(rounds),
                expected="as many of each cache",
                fix="give the loaders the same batch_sequences over micro_batch",
            )
        self._seed, self._position, self._rounds = seed, 0, rounds.pop()
        self._is_spent = False
        self._counted = self._names.index(self._names[0] if epochs_of is None else epochs_of)
        # of a round: rows are what all caches have alike
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
        """What remains, as the loader's; likewise an InputError where an iterator has come to the end before."""
        if self._is_spent:
            raise another_pass(len(self))
        streams = [iter(loader) for loader in self._loaders]
        try:
            while self._position < len(self):
                which = self._turn(self._position // self._rounds)
                self._position += 1
                batch = next(streams[which])
                if self._position == len(self):
                    # a loader asks before its own last batch, which may not be reached
                    for loader in self._loaders:
                        loader.require_sound()
                yield batch
            self._is_spent = True
        finally:
            for stream in streams:
                stream.close()

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        return self._num_steps

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which the counted cache is read once, on average."""
        own = self._loaders[self._counted].steps_per_epoch
        return own * float(self._shares.sum() / self._shares[self._counted])

    @property
    def num_tokens(self) -> int:
        """Targets of the whole training over all ranks, without padding."""
        return int(self._given(self._num_steps) @ self._tokens)

    @property
    def tokens_per_step(self) -> int:
        """Targets of one step over all ranks on average, without padding."""
        return round(self.num_tokens / self.num_steps)

    @property
    def skipped(self) -> dict[str, int]:
        """Sequences in each damaged member that was passed over, of every cache."""
        return {name: number for loader in self._loaders for name, number in loader.skipped.items()}

    def micro_batch(self, number: int) -> Batch:
        """This rank's micro-batch of that number, counted over the whole training."""
        loader, own = self._source(number)
        return loader.micro_batch(own)

    def names(self, number: int) -> list[str]:
        """The sequences of that micro-batch as errors name them; as the loader's."""
        loader, own = self._source(number)
        return loader.names(own)

    def state_dict(self) -> dict[str, Any]:
        """The number of rows handed out over all ranks, what it counts, and the loaders' own states."""
        states = {name: loader.state_dict() for name, loader in zip(self._names, self._loaders, strict=True)}
        return {"position": self._position * self._rows, **self._counts(), "loaders": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that many rows.

        Raises:
            InputError: the state counts another mix, the order of one of the caches is another, or it stops within a
                round of these micro-batches.
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
        """Which loader gives that step."""
        cycle, turn = divmod(step, _CYCLE)
        return int(self._turns(cycle)[turn])

    def _given(self, step: int) -> npt.NDArray[np.int64]:
        """Steps that each loader has given before that one."""
        cycle, turn = divmod(step, _CYCLE)
        return cycle * self._shares + np.bincount(self._turns(cycle)[:turn], minlength=len(self._shares))

    def _source(self, number: int) -> tuple[SequenceLoader, int]:
        """Whose micro-batch that one is, and its number there."""
        step, part = divmod(number, self._rounds)
        which = self._turn(step)
        return self._loaders[which], int(self._given(step)[which]) * self._rounds + part

    def _most(self, max_tokens: int | None) -> int:
        """Steps that there are data for, and that fit."""
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
        # one turn drawn in each of a loader's equal parts of the cycle, so that short stretches are near the mix too
        at = [(np.arange(share) + generator.random(share)) / share for share in self._shares]
        turns: npt.NDArray[np.int64] = np.repeat(np.arange(len(self._shares)), self._shares)
        return turns[np.argsort(np.concatenate(at), kind="stable")]


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest position up to `most` that fits; all below it do."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _shares(names: list[str], weights: Mapping[str, float]) -> npt.NDArray[np.int64]:
    """Turns of each loader in a cycle: its weight's share, rounded so that all of them together fill the cycle."""
    given = np.array([weights[name] for name in names], dtype=np.float64)
    if not (np.isfinite(given) & (given > 0)).all():
        raise InputError("weights", found=dict(weights), expected="numbers above 0")
    exact = given / given.sum() * _CYCLE
    shares: npt.NDArray[np.int64] = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: _CYCLE - int(shares.sum())]] += 1
    if not shares.all():
        raise InputError("weights", found=dict(weights), expected=f"none below one in {_CYCLE} of their sum")
    return shares
