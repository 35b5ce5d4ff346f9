from __future__ import annotations

import numpy as np
import pytest

from capgap.pipeline.train.optimizer import learning_rate_factor, optimizer_and_schedule
from capgap.schemas.run_optimization import OptimizationSettings


def test_the_learning_rate_rises_to_its_peak_and_ends_at_the_final_ratio() -> None:
    settings = OptimizationSettings(warmup_fraction=0.1, final_learning_rate_ratio=0.2)
    factors = [learning_rate_factor(settings, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert np.diff(factors[:11]) == pytest.approx(1 / 11), "linear"
    assert factors[10] == max(factors) == 1
    assert (np.diff(factors[10:]) < 0).all()
    assert factors[99] == pytest.approx(0.2)
    assert learning_rate_factor(settings, 200, 100) == pytest.approx(0.2), "it stays there"


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_shortest_trainings_have_a_learning_rate(num_steps: int) -> None:
    for warmup in (0.0, 0.05, 0.9):
        settings = OptimizationSettings(warmup_fraction=warmup)
        assert all(0.1 <= learning_rate_factor(settings, step, num_steps) <= 1 for step in range(num_steps))


@pytest.mark.parametrize("num_steps", [2, 3, 5, 8, 10, 12, 15, 20, 30, 100])
@pytest.mark.parametrize(
    "shape",
    [
        {"schedule": "wsd"},
        {"schedule": "wsd", "decay_shape": "sqrt", "decay_fraction": 0.01},
        {"schedule": "wsd", "decay_shape": "linear", "warmup_fraction": 0.9},
        {"schedule": "cosine"},
        {"schedule": "cosine", "warmup_fraction": 0.99},
    ],
)
def test_the_last_step_has_the_final_ratio_however_few_steps_the_decay_has(shape: dict, num_steps: int) -> None:
    settings = OptimizationSettings(final_learning_rate_ratio=0.2, **shape)
    factors = [learning_rate_factor(settings, step, num_steps) for step in range(num_steps)]
    assert factors[-1] == 0.2
    assert all(0.0 < factor <= 1 for factor in factors[:-1])


def test_matrices_decay_and_vectors_do_not(make_student) -> None:
    optimizer = optimizer_and_schedule(make_student().parameters(), OptimizationSettings(), 10)["optimizer"]
    decays = {p.dim(): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}


def test_what_is_frozen_is_not_in_the_optimizer(make_student) -> None:
    model = make_student(tied=False)
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = optimizer_and_schedule(model.parameters(), OptimizationSettings(), 10)["optimizer"]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} - {id(model.model.embed_tokens.weight)}


@pytest.mark.parametrize(
    ("shape", "half_way"), [("exponential", 0.25**0.5), ("sqrt", 1 - 0.75 * 0.5**0.5), ("linear", 0.625)]
)
def test_wsd_warms_up_stays_and_decays_over_the_last_steps(shape: str, half_way: float) -> None:
    settings = OptimizationSettings(
        schedule="wsd", warmup_fraction=0.1, decay_fraction=0.21, decay_shape=shape, final_learning_rate_ratio=0.25
    )
    factors = [learning_rate_factor(settings, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx(np.arange(1, 11) / 11)
    assert factors[10:80] == [1.0] * 70
    assert (np.diff(factors[79:]) < 0).all()
    # the decay goes from step 79 to step 99, and step 89 is half way
    assert factors[89] == pytest.approx(half_way)
    assert factors[99] == pytest.approx(0.25)
    assert learning_rate_factor(settings, 200, 100) == pytest.approx(0.25), "it stays there"


def test_the_decay_of_wsd_takes_a_tenth_of_the_steps_where_nothing_is_said() -> None:
    settings = OptimizationSettings(schedule="wsd")
    falling = [step for step in range(1000) if step > 50 and learning_rate_factor(settings, step, 1000) < 1]
    assert falling == list(range(901, 1000))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_optimizer_takes_the_rate_of_each_step(make_student, schedule: str) -> None:
    settings = OptimizationSettings(schedule=schedule, learning_rate=0.5)
    made = optimizer_and_schedule(make_student().parameters(), settings, 20)
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert made["lr_scheduler"]["interval"] == "step"
    for step in range(20):
        expected = 0.5 * learning_rate_factor(settings, step, 20)
        assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(expected)] * 2
        optimizer.step()
        scheduler.step()
