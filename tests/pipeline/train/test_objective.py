from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from capgap.kernels.sparse_kl import Divergence, Tail
from capgap.pipeline.store import Batch
from capgap.pipeline.train.objective import Objective, objective_of
from capgap.schemas.errors import MismatchError
from capgap.schemas.run_train import TrainSettings


@pytest.mark.parametrize(("setting", "known"), [("divergence", Divergence), ("tail", Tail)])
def test_settings_name_what_the_loss_has(setting: str, known) -> None:
    annotation = TrainSettings.model_fields[setting].annotation
    names = {name for part in (annotation, *get_args(annotation)) for name in get_args(part) if isinstance(name, str)}
    # the policy gradient is no function of targets, and has a loss of its own
    assert names - {"policy_gradient"} == set(get_args(known))


def test_no_choice_is_the_default_objective() -> None:
    settings = TrainSettings()
    assert Objective() == Objective(settings.divergence, settings.tail, settings.beta)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("first", "last"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.8), (0.5, 0.5)])
def test_alpha_goes_from_its_first_to_its_last_value_and_never_past_either(shape, first: float, last: float) -> None:
    objective = Objective(final_alpha=last, alpha_schedule=shape)
    alphas = [objective.alpha(first, step, 101) for step in range(101)]
    assert (alphas[0], alphas[100], objective.alpha(first, 500, 101)) == (first, last, last)
    assert alphas[50] == pytest.approx((first + last) / 2)
    assert alphas == sorted(alphas, reverse=last < first)
    assert min(first, last) <= min(alphas) and max(alphas) <= max(first, last)
    quarter = 0.25 if shape == "linear" else (1 - 0.5**0.5) / 2
    assert alphas[25] == pytest.approx(first + (last - first) * quarter)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_shortest_trainings_have_an_alpha(num_steps: int) -> None:
    objective = Objective(final_alpha=0.0)
    assert [objective.alpha(1.0, step, num_steps) for step in range(num_steps)] == [1.0, 0.0][:num_steps]


def test_without_a_final_value_alpha_stays() -> None:
    assert {Objective().alpha(0.7, step, 10) for step in range(12)} == {0.7}


def test_a_row_counts_as_many_nats_as_the_teacher_is_uncertain() -> None:
    certain, flat, tail = [1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.0, 0.0, 0.0]
    batch = Batch(
        torch.zeros(1, 3, dtype=torch.long),
        torch.zeros(1, 3, dtype=torch.long),
        torch.arange(4).expand(3, 4),
        torch.tensor([certain, flat, tail]),
        torch.tensor([0.0, 0.0, 0.5]),
    )
    weights_N = Objective(token_weights="entropy").row_weights(batch)
    # of a certain row the loss is still measured
    assert weights_N.tolist() == pytest.approx([1e-4, math.log(4), math.log(2)])
    assert Objective().row_weights(batch) is None


def test_text_without_targets_counts_evenly() -> None:
    batch = Batch(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
    assert Objective(token_weights="entropy").row_weights(batch) is None


def test_draws_do_not_tell_the_teachers_entropy() -> None:
    settings = TrainSettings(token_weights="entropy")
    assert objective_of(settings, "topk", "there").token_weights == "entropy"
    with pytest.raises(MismatchError, match=r"there: the cache does not support these .* found sampled targets with"):
        objective_of(settings, "sampled", "there")


def test_every_setting_of_the_loss_reaches_it() -> None:
    settings = TrainSettings(
        divergence="jsd",
        jsd_beta=0.3,
        tail="renorm",
        final_alpha=0.25,
        alpha_schedule="cosine",
        token_weights="entropy",
        router_loss_weight=0.5,
    )
    assert objective_of(settings, "topk", "there") == Objective("jsd", "renorm", 0.3, 0.25, "cosine", "entropy", 0.5)


def test_a_divergence_is_checked_where_it_counts_in_any_step() -> None:
    objective_of(TrainSettings(alpha=0.0, divergence="reverse_kl"), "sampled", "there")
    with pytest.raises(MismatchError, match="the cache does not support this divergence"):
        objective_of(TrainSettings(alpha=0.0, final_alpha=0.5, divergence="reverse_kl"), "sampled", "there")
