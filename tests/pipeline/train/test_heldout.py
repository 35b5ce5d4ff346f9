"""The loss on held-out text."""

from __future__ import annotations

import pytest
import torch

from capgap.pipeline.store.batch import collate
from capgap.pipeline.train.heldout import heldout_loss
from capgap.pipeline.train.module import DistillationModule
from capgap.schemas.run_model import OptimizationSettings


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
