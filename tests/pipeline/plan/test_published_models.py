"""The paper's table of models against what can be worked out again."""

from __future__ import annotations

import pytest

from capgap.pipeline.plan.costs import paper_flops, training_flops
from capgap.pipeline.plan.published_models import MODELS, SHOTS, not_dominated

BY_NAME = {model.name: model for model in MODELS}

# Parameters, training tokens and, for the distilled one, the teacher's parameters, as their makers published them.
KNOWN = {
    "LLaMA-2-7B": (7.0e9, 2.0e12, None),
    "StableLM-3B": (3.0e9, 4.0e12, None),
    "Qwen-1.8B": (1.8e9, 2.2e12, None),
    "BTLM-3B": (3.0e9, 627e9, None),
    "ShearedLLaMA-2.7B": (2.7e9, 50e9, None),
    "MiniMA-3B": (3.02e9, 126e9, 6.88e9),
}


@pytest.mark.parametrize("name", KNOWN)
def test_compute_comes_out_to_the_digits_that_are_printed(name: str) -> None:
    size, tokens, teacher = KNOWN[name]
    assert f"{paper_flops(size, tokens, teacher) / 1e21:.1f}" == f"{BY_NAME[name].flops / 1e21:.1f}"


def test_compute_that_does_not_come_out_is_marked_as_doubtful() -> None:
    (doubtful,) = (model for model in MODELS if model.doubt)
    assert doubtful.name == "Phi-2-2.8B" and "a seventh" in doubtful.doubt
    assert doubtful.flops / training_flops(2.7e9, 1.4e12) == pytest.approx(7, abs=0.1)


def test_every_model_has_a_score_on_each_of_the_six() -> None:
    assert len(BY_NAME) == len(MODELS) == 11
    assert all(len(model.scores) == len(SHOTS) == 6 for model in MODELS)
    assert all(0 <= score <= 100 for model in MODELS for score in model.scores)
    assert BY_NAME["MiniMA-3B"].mean == pytest.approx(21.66, abs=0.005)


def test_those_that_no_other_beats_rise_in_cost_and_quality_and_beat_all_others() -> None:
    best = not_dominated()
    assert [model.name for model in best] == ["ShearedLLaMA-2.7B", "MiniChat-3B", "MiniChat-2-3B", "Phi-2-2.8B"]
    for model in set(MODELS) - set(best):
        assert any(one.flops <= model.flops and one.mean >= model.mean for one in best)
