"""Each line of what a cache supports is what the trainer and its loss do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl
from capgap.pipeline.fidelity.supports import supports
from capgap.pipeline.store import ShardReader, target_temperature_of
from capgap.pipeline.store.batch import Batch, collate
from capgap.pipeline.train.caches import chosen_caches
from capgap.pipeline.train.objective import objective_of
from capgap.schemas.errors import CapgapError
from capgap.schemas.facts import CacheFacts
from capgap.schemas.run_train import TrainSettings


@pytest.fixture(scope="module")
def cache(tmp_path_factory, make_cache):
    p_V = np.full(200, 1 / 200)
    return make_cache(tmp_path_factory.mktemp("x") / "c", p_V, np.zeros(80), {"topk": 4, "sampled": 5}, (3.0,))


def _batch(cache, name: str, temperature: float) -> Batch:
    reader = ShardReader(cache.location, cache.manifest.shard_sets[name])
    sequences, targets = reader.read(0)
    return collate(
        [(sequences, targets, 0)], reader.codec.num_ids, target_temperature_of(reader.codec, 1.0, temperature)
    )


def _loss_takes(batch: Batch, name, divergence: str, tail: str) -> bool:
    targets = SparseTargets(batch.ids_NK, batch.weights_NK, batch.tail_N, name)
    hidden_NH = torch.randn(len(targets), 8)
    labels_N = batch.labels_BL.flatten().clamp_min(0)
    try:
        linear_sparse_kl(hidden_NH, torch.randn(200, 8), targets, labels_N, alpha=1.0, divergence=divergence, tail=tail)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", ["topk", "sampled"])
def test_divergences_and_tails_are_those_that_the_loss_takes(cache, name) -> None:
    found = [
        one for one in supports(CacheFacts.model_validate(cache.manifest.facts), name) if "divergence" in one.settings
    ]
    assert len(found) == 12
    batch = _batch(cache, name, 1.0)
    taken = [_loss_takes(batch, name, one.settings["divergence"], one.settings["tail"]) for one in found]
    assert [one.supported for one in found] == taken
    assert sum(taken) == (8 if name == "topk" else 2)


@pytest.mark.parametrize("name", ["topk", "sampled"])
def test_temperatures_and_weights_are_those_that_a_training_takes(cache, name) -> None:
    found = [
        one
        for one in supports(CacheFacts.model_validate(cache.manifest.facts), name)
        if "divergence" not in one.settings
    ]
    temperatures = {one.settings["temperature"]: one.supported for one in found if "temperature" in one.settings}
    assert temperatures == ({1.0: True, 2.0: False, 3.0: True} if name == "topk" else {1.0: True, 2.0: False})
    weights = {one.settings["token_weights"]: one.supported for one in found if "token_weights" in one.settings}
    assert weights == {"equal": True, "entropy": name == "topk"}
    for one in found:
        settings = TrainSettings.model_validate({"recording": name, **one.settings})
        try:
            (chosen,) = chosen_caches(settings, {"cache": cache}).values()
            objective = objective_of(settings, chosen.recording, "here")
            batch = _batch(cache, name, chosen.temperature)
            objective.row_weights(batch)
        except CapgapError:
            assert not one.supported
        else:
            assert one.supported


def test_a_refusal_says_why_in_the_trainers_words(cache) -> None:
    facts = CacheFacts.model_validate(cache.manifest.facts)
    said = {
        tuple(one.settings.values()): one.why
        for name in ("topk", "sampled")
        for one in supports(facts, name)
        if one.why
    }
    assert "only the forward KL's gradient is linear in them" in str(said["jsd", "renorm"])
    assert "a few samples do not give the teacher's entropy" in str(said["entropy",])
    assert "no targets at this temperature; expected 1" in str(said[2.0,])
    assert all(one.why is None for one in supports(facts, "topk") if one.supported)
