"""What a card says of the loss, of what was learnt from, and of a student that learnt nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.train.model_card import _loss, _what
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_train import TrainSettings

CACHED = "distilled from a teacher's cached distributions"


@pytest.mark.parametrize(
    ("settings", "loss", "what"),
    [
        ({}, "1 x 1^2 x forward_kl", CACHED),
        ({"alpha": 0.25}, "0.25 x 1^2 x forward_kl + 0.75 x cross-entropy", CACHED),
        ({"alpha": 0.25, "final_alpha": 0.25}, "0.25 x 1^2 x forward_kl + 0.75 x cross-entropy", CACHED),
        ({"alpha": 0.0}, "cross-entropy", "trained on text alone"),
        (
            {"alpha": 0.0, "final_alpha": 1.0},
            "alpha x 1^2 x forward_kl + (1 - alpha) x cross-entropy (alpha from 0 to 1, linear)",
            CACHED,
        ),
        (
            {"alpha": 1.0, "final_alpha": 0.0, "alpha_schedule": "cosine"},
            "alpha x 1^2 x forward_kl + (1 - alpha) x cross-entropy (alpha from 1 to 0, cosine)",
            CACHED,
        ),
        (
            {"targets": "online"},
            "1 x 1^2 x forward_kl",
            "distilled from the distributions of a teacher that stood beside it",
        ),
        ({"targets": "online", "alpha": 0.0}, "cross-entropy", "trained on text alone"),
        ({"max_tokens": 0}, "none: untrained", "untrained: as the student was before the other arms were trained"),
    ],
)
def test_a_card_says_by_which_loss_and_from_what_a_student_learnt(
    settings: dict[str, Any], loss: str, what: str
) -> None:
    found = TrainSettings.model_validate(settings)
    assert (_loss(found, "topk", 1.0), _what(found)) == (loss, what)


@pytest.mark.parametrize(
    ("recording", "settings", "loss"),
    [
        ("topk", {"alpha": 0.5}, "0.5 x 100^2 x forward_kl + 0.5 x cross-entropy"),
        # The divergence of chunks is multiplied by the temperature once.
        ("chunks", {"alpha": 0.5}, "0.5 x 100 x forward_kl + 0.5 x cross-entropy"),
        (
            "chunks",
            {"divergence": "reverse_kl", "projected_weight": 0.25},
            "1 x 100 x reverse_kl + 0.25 x reverse_kl of projected targets, at temperature 1",
        ),
        ("chunks", {"alpha": 0.0, "projected_weight": 0.25}, "cross-entropy"),
        (
            "topk",
            {"router_loss_weight": 0.01, "token_weights": "entropy"},
            "1 x 100^2 x forward_kl + 0.01 x the router's load-balancing loss; tokens are weighted by the teacher's "
            "entropy",
        ),
        ("topk", {"alpha": 0.0, "router_loss_weight": 0.01}, "cross-entropy + 0.01 x the router's load-balancing loss"),
        (
            "sampled",
            {"divergence": "policy_gradient", "alpha": 0.9},
            "0.9 x policy_gradient (ratio_clip 0.2; forward_kl for text that the teacher wrote) + 0.1 x cross-entropy",
        ),
    ],
)
def test_a_card_states_every_term_of_the_loss_with_the_factor_that_was_trained(
    recording: RecordingName, settings: dict[str, Any], loss: str
) -> None:
    assert _loss(TrainSettings.model_validate(settings), recording, 100.0) == loss


def test_the_card_of_an_untrained_student_says_so(made: dict[str, Any]) -> None:
    run = RunFile.model_validate(made["number"] | {"arms": {"untrained": {"max_tokens": 0}}})
    carry_out(run, Instance("train", "untrained", 1))
    text = (Path(run.out) / "train" / "untrained" / "seed-1" / "model" / "README.md").read_text()
    assert "distilled" not in text.split("knowledge-distillation")[1]
    for line in ("recording", "loss", "optimization"):
        assert f"| {line} | none: untrained |" in text
