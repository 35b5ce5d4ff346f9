"""A cache is refused whose teacher does not predict the text as the teacher stage measured it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from capgap.pipeline.cache.label_loss import LABEL_LOSS, NUM_SEQUENCES, label_loss_of, require_as_measured
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.folder import content_files, finish
from capgap.pipeline.stage.identity import content_of
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import ShardReader
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import MismatchError
from capgap.schemas.run_file import RunFile

SHAPE = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
TRAINING = {
    "max_tokens": 20_000,
    "batch_sequences": 4,
    "micro_batch_sequences": 4,
    "learning_rate": 1e-2,
    "num_validation_sequences": 16,
}


@pytest.fixture
def trained(inputs: dict[str, Any], tmp_path: Path) -> RunFile:
    """A run whose teacher was trained on half of the text; its cache holds sixteen held-out sequences."""
    corpus = inputs["corpus"] | {"teacher_fraction": 0.5}
    teacher = {"teacher": {"model": SHAPE, "training": TRAINING}}
    cache = inputs["cache"] | {"num_heldout_sequences": 16}
    run = RunFile.model_validate(inputs | {"out": str(tmp_path / "out"), "corpus": corpus, "cache": cache} | teacher)
    carry_out(run, Instance("corpus"))
    carry_out(run, Instance("teacher"))
    return run


def _damaged_before_its_digests_were_taken(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    chance = np.random.default_rng(0)
    # no tensor is anywhere what it was
    mixed = {
        name: one.flatten()[chance.permutation(one.numel())].reshape(one.shape) * 2
        for name, one in load_file(path).items()
    }
    save_file(mixed, path, metadata={"format": "pt"})
    manifest, files = read_manifest(folder), content_files(folder)
    assert manifest is not None
    finish(folder, manifest.model_copy(update={"files": files, "content": content_of(files, manifest.sources)}))


def test_the_cache_measures_what_the_teacher_stage_measured(trained: RunFile) -> None:
    manifest = carry_out(trained, Instance("cache"))
    totals = read_manifest(Path(trained.out) / "teacher").totals
    heldout = ShardReader(Path(trained.out) / "cache", manifest.shard_sets["heldout-sampled"])
    found = label_loss_of(heldout)
    assert found is not None and found.num_sequences == totals[NUM_SEQUENCES] == 16
    # the same sequences by the same library: what is left is the rounding to 1/128 nat of each label
    assert found.mean == pytest.approx(totals[LABEL_LOSS], abs=2e-3)
    assert 0 < found.spread < found.mean < 0.8 * math.log(300)


def test_a_teacher_that_was_spoilt_before_its_digests_were_taken_makes_no_cache(trained: RunFile) -> None:
    _damaged_before_its_digests_were_taken(Path(trained.out) / "teacher")
    said = (
        r"cache: the teacher does not predict the text as well as the teacher stage measured; found [\d.]+ "
        r"nats/token over 16 held-out sequences, expected [\d.]+, measured over 16, within [\d.]+; .*--remake teacher"
    )
    with pytest.raises(MismatchError, match=said):
        carry_out(trained, Instance("cache"))
    assert read_manifest(Path(trained.out) / "cache") is None


def test_the_bound_is_ten_standard_errors_and_a_twentieth_of_a_nat(trained: RunFile) -> None:
    manifest = carry_out(trained, Instance("cache"))
    reader = ShardReader(Path(trained.out) / "cache", manifest.shard_sets["heldout-sampled"])
    found = label_loss_of(reader)
    assert found is not None
    allowed = 10 * found.spread * math.sqrt(1 / 16 + 1 / 64) + 0.05
    teacher = read_manifest(Path(trained.out) / "teacher")
    for sign in (-1, 1):
        for share, refused in ((0.99, False), (1.01, True)):
            totals = {LABEL_LOSS: found.mean + sign * share * allowed, NUM_SEQUENCES: 64}
            measured = teacher.model_copy(update={"totals": totals})
            if not refused:
                require_as_measured(measured, reader, "here")
                continue
            with pytest.raises(MismatchError, match=r"^here: "):
                require_as_measured(measured, reader, "here")


def test_without_held_out_sequences_it_is_said_that_nothing_was_compared(
    trained: RunFile, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "capgap")
    cache = trained.cache.model_copy(update={"num_heldout_sequences": 0})
    carry_out(trained.model_copy(update={"cache": cache}), Instance("cache"))
    assert "not compared with the loss that the teacher stage measured" in caplog.text


def test_a_given_teacher_that_knows_nothing_is_said_and_not_refused(run, caplog: pytest.LogCaptureFixture) -> None:
    manifest = carry_out(run(), Instance("cache"))
    assert manifest.facts["mean_label_loss"] > 0.9 * math.log(300)
    assert "and a model that knows nothing has 5.70: is it the intended model" in caplog.text
