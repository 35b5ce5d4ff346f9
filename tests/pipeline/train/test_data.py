"""What the loader of a training hands out: one cache, or several by weight."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tasks import tiny_task

from capgap.pipeline.store import Batch, MixedLoader
from capgap.pipeline.store.reader import ShardReader
from capgap.pipeline.train.data import heldout_batches, training_loader
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.task import CacheSource, TrainingTask
from capgap.schemas.errors import InputError

SEQ_LEN = 16


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory) -> dict[str, ShardReader]:
    """48 sequences of the task's own, 24 and 12 of others; no text twice."""
    folder = tmp_path_factory.mktemp("shards")
    return {
        "own": make_shards(folder / "own", "sampled", 48),
        "samples": make_shards(folder / "samples", "sampled", 24, seed=1),
        "kept": make_shards(folder / "kept", "topk", 12, seed=2),
        "heldout": make_shards(folder / "heldout", None, 12, seed=3),
    }


@pytest.fixture
def make_task(shards, tmp_path) -> Callable[..., TrainingTask]:
    def make(
        others: dict[str, CacheSource] | None = None, weight: float = 1.0, row_len: int | None = None, **given
    ) -> TrainingTask:
        settings: dict[str, Any] = {"batch_sequences": 4, "micro_batch_sequences": 2, "learning_rate": 1e-2}
        mix = {"row_len": row_len, "weight": weight, "others": others or {}}
        return tiny_task(tmp_path, shards["own"], shards["heldout"], settings | given, **mix)

    return make


def _rows(batches: list[Batch]) -> list[bytes]:
    return [row.numpy().tobytes() for batch in batches for row in batch.input_ids_BL]


def _texts(reader: ShardReader) -> set[bytes]:
    tokens = [reader.read(i)[0].tokens_BL1[:, :-1] for i in range(reader.shard_set.num_members)]
    return {row.astype("int64").tobytes() for part in tokens for row in part}


def test_the_own_cache_is_read_once_an_epoch_and_the_others_as_often_as_the_mix_takes(shards, make_task) -> None:
    others = {"samples": CacheSource(shards["samples"], 1.0), "kept": CacheSource(shards["kept"], 2.0)}
    loader = training_loader(make_task(others, weight=1.0, num_epochs=2))
    batches = list(loader)
    assert isinstance(loader, MixedLoader) and len(batches) == len(loader) == 2 * loader.num_steps
    texts = {name: _texts(shards[name]) for name in ("own", "samples", "kept")}
    counts = {name: sum(row in texts[name] for row in _rows(batches)) for name in texts}
    assert sum(counts.values()) == 2 * len(batches), "each row is of one cache"
    assert 86 <= counts["own"] <= 96, "its two epochs, to the last whole step"
    # a quarter and a half of all, within a few steps of 4 sequences
    assert 80 <= counts["samples"] <= 112 and 172 <= counts["kept"] <= 212
    for batch in batches:
        sources = {name for name in texts for row in _rows([batch]) if row in texts[name]}
        assert len(sources) == 1
        assert (batch.tail_N is None) == (sources != {"kept"})
    assert loader.steps_per_epoch == pytest.approx(12 * 4)
    assert loader.num_tokens == len(batches) * 2 * SEQ_LEN == loader.num_steps * loader.tokens_per_step


def test_a_mix_stops_at_max_tokens_and_at_the_end_of_the_own_epochs(shards, make_task) -> None:
    others = {"samples": CacheSource(shards["samples"])}
    whole = training_loader(make_task(others))
    short = training_loader(make_task(others, max_tokens=4 * SEQ_LEN * 5 + 1))
    assert (short.num_steps, len(short)) == (5, 10)
    assert training_loader(make_task(others, max_tokens=10**9)).num_steps == whole.num_steps
    assert _rows(list(short)) == _rows(list(whole))[:20]


def test_every_cache_fills_rows_of_one_length(shards, make_task, make_shards, tmp_path) -> None:
    loader = training_loader(make_task({"kept": CacheSource(shards["kept"])}, row_len=2 * SEQ_LEN + 3))
    batches = list(itertools.islice(loader, 8))
    assert {tuple(batch.input_ids_BL.shape) for batch in batches} == {(1, 2 * SEQ_LEN + 3)}
    assert loader.num_tokens == len(loader) * 2 * SEQ_LEN, "padding is not counted"


def test_a_killed_training_on_several_caches_goes_on_to_the_bit(shards, make_task, make_student, tmp_path) -> None:
    others = {"samples": CacheSource(shards["samples"], 1.5), "kept": CacheSource(shards["kept"], 0.5)}
    weights = []
    for folder, kill in (("whole", None), ("killed", 9)):
        task = make_task(others, row_len=40, checkpoint_every_steps=4, validate_every_steps=50)
        task = dataclasses.replace(task, folder=tmp_path / folder)
        task.folder.mkdir()
        if kill is not None:
            with pytest.raises(_KilledError):
                _fit_until(kill, make_student(), task)
        model = make_student()
        totals = fit(model, task)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert totals["num_steps"] > 20
    assert torch.equal(*weights)


class _KilledError(Exception):
    pass


def _fit_until(step: int, model: Any, task: TrainingTask) -> None:
    """Train as `fit` does and be killed in that step: its gradient is never applied."""
    calls = itertools.count()

    def stop(*_: Any) -> None:
        if next(calls) == 2 * step:
            raise _KilledError

    model.base_model.register_forward_pre_hook(stop)
    fit(model, task)


def test_held_out_documents_are_measured_by_themselves(make_task) -> None:
    task = make_task()
    packed = list(heldout_batches(task, 8))
    documents = list(heldout_batches(dataclasses.replace(task, context="document"), 8))
    assert all(batch.positions_BL is None for batch in packed)
    assert _rows(packed) == _rows(documents)
    assert all(batch.positions_BL is not None and (batch.positions_BL[:, 0] == 0).all() for batch in documents)


def test_a_cache_without_a_step_is_refused(make_task, make_shards, tmp_path: Path) -> None:
    few = make_shards(tmp_path / "few", "sampled", 3)
    with pytest.raises(InputError, match="too few sequences for one step; found 3 sequences, expected at least 4"):
        training_loader(make_task({"few": CacheSource(few)}))
