from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from capgap.pipeline.store.batch import collate
from capgap.pipeline.train.callbacks import MetricsFile, heldout_loss, newest_checkpoint
from capgap.pipeline.train.module import DistillationModule
from capgap.schemas.run_model import OptimizationSettings


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_past_the_checkpoint_and_a_torn_row_are_dropped(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    for step in (5, 10, 15):
        file.add(step=step, train_loss=1.5, tokens_per_s=100.0)
    with path.open("a") as torn:
        torn.write("20,0.5,3")
    MetricsFile(path, 10).add(step=15, train_loss=1.25, tokens_per_s=90.0)
    assert [(row["step"], row["train_loss"]) for row in _rows(path)] == [("5", "1.5"), ("10", "1.5"), ("15", "1.25")]


def test_a_fresh_training_forgets_what_an_earlier_one_logged(tmp_path) -> None:
    MetricsFile(tmp_path / "metrics.csv", 0).add(step=5, tokens_per_s=1.0)
    MetricsFile(tmp_path / "metrics.csv", 0)
    assert _rows(tmp_path / "metrics.csv") == []


def test_a_checkpoint_that_was_being_saved_does_not_count(tmp_path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("step-00000010.ckpt", "step-00000009.ckpt", "step-00000020.saving"):
        (tmp_path / name).touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000010.ckpt"


def test_the_held_out_loss_is_the_mean_over_labels_of_all_batches(make_student, make_sequences) -> None:
    sequences = make_sequences(5)
    sequences.mask_BL1[0, 3:] = False
    batches = [collate([(sequences, None, row) for row in rows], 1) for rows in ((0,), (1, 2, 3, 4))]
    module = DistillationModule(make_student(), OptimizationSettings(), 10, 1.0, 1.0, 40)
    module.train()
    found = heldout_loss(module, batches)
    assert module.training, "it is given back as it was"
    tokens = torch.from_numpy(sequences.tokens_BL1).long()
    with torch.inference_mode():
        logits = module.model(input_ids=tokens[:, :-1]).logits[..., :40].double()
    nats = -torch.log_softmax(logits, -1).gather(2, tokens[:, 1:, None])[..., 0]
    expected = nats[torch.from_numpy(sequences.mask_BL1[:, 1:])].mean()
    assert found == pytest.approx(float(expected), abs=1e-6)  # float32 rows
