"""Each verdict as it is defined."""

from __future__ import annotations

import math

import numpy as np
import pytest

from capgap.pipeline.eval.intervals import t_quantile
from capgap.pipeline.law.contrasts import Contrasts, contrasts, many_to_one
from capgap.pipeline.law.verdict import Judged, delta_of, judge


def verdict(losses: list[float], noise: float = 0.001, places: list[float] | None = None) -> Judged:
    found = Contrasts(np.array(losses), noise, degrees=2 * (len(losses) - 1), num_seeds=3)
    where = np.arange(len(losses), dtype=float) if places is None else np.array(places)
    return judge(where, tuple(f"t{i}" for i in range(len(losses))), found, delta_of(found))


@pytest.mark.parametrize(
    "losses, expected",
    [
        ([3.05, 3.01, 3.00, 3.02, 3.04], "interior"),
        ([3.05, 3.02, 3.00, 3.00, 3.00], "saturating"),
        ([3.05, 3.04, 3.03, 3.02, 3.01], "edge"),
        ([3.00, 3.01, 3.02, 3.03, 3.04], "edge"),
        ([3.00, 3.00, 3.00, 3.04, 3.05], "edge"),
        ([3.0005, 3.0, 3.001, 3.0, 3.0005], "flat"),
        ([3.05, 3.00, 3.05], "interior"),
    ],
)
def test_a_verdict_follows_its_definition(losses: list[float], expected: str) -> None:
    assert verdict(losses).verdict == expected


def test_noise_turns_an_interior_curve_flat() -> None:
    losses = [3.02, 3.00, 3.02]
    assert verdict(losses, noise=0.001).verdict == "interior"
    assert verdict(losses, noise=0.05).verdict == "flat"


def test_the_pilot_of_small_models_saturates() -> None:
    """A student of 7.5k parameters, alpha 0.5, teachers of 1 to 63 x: a parabola claims a best at 16 x."""
    found = Contrasts(np.array([2.8890, 2.8816, 2.8800, 2.8798, 2.8807]), 0.0017, degrees=20, num_seeds=6)
    judged = judge(np.log([1.0, 2.7, 6.7, 22.4, 62.6]), ("1x", "2.7x", "6.7x", "22x", "63x"), found, delta_of(found))
    assert judged.verdict == "saturating"
    assert "from 2.7x on nothing is gained beyond delta = 0.0050" in judged.reason


def test_the_bracket_is_the_nearest_worse_teacher_on_each_side() -> None:
    bracket = verdict([3.05, 3.02, 3.0005, 3.00, 3.0005, 3.02, 3.05]).bracket
    assert bracket is not None
    assert (bracket.low, bracket.high) == (1.0, 5.0)


def test_teachers_of_one_place_must_all_be_worse() -> None:
    """Two teachers of the largest size: one badly trained is no sign that larger teachers are worse."""
    places = [0.0, 1.0, 2.0, 2.0]
    assert verdict([3.05, 3.00, 3.05, 3.0005], places=places).verdict == "saturating"
    assert verdict([3.05, 3.00, 3.05, 3.04], places=places).verdict == "interior"


def test_the_order_of_teachers_does_not_matter() -> None:
    assert verdict([3.00, 3.05, 3.04], places=[1.0, 0.0, 2.0]).verdict == "interior"


def test_delta_is_at_least_a_standard_error() -> None:
    found = Contrasts(np.array([3.0, 3.0]), noise=0.03, degrees=2, num_seeds=2)
    assert delta_of(found) == pytest.approx(0.03)
    assert delta_of(Contrasts(np.array([3.0, 3.0]), noise=0.001, degrees=2, num_seeds=2)) == 0.005


def test_a_seeds_own_luck_is_no_noise() -> None:
    rest = np.random.default_rng(0).normal(0, 0.001, (5, 4))
    luck = np.array([0.0, 1.0, -2.0, 5.0])
    assert contrasts(rest + luck).noise == pytest.approx(contrasts(rest).noise)
    assert contrasts(rest).degrees == 12


@pytest.mark.parametrize("num_others, degrees", [(1, 4), (2, 10), (4, 20), (8, 60)])
def test_noise_passes_the_critical_value_at_its_level(num_others: int, degrees: int) -> None:
    """The probability by integration over the one teacher's noise and over the estimated spread."""
    value = many_to_one(num_others, degrees)
    z, spread = np.linspace(-8, 8, 1601), np.linspace(0.005, 5, 1000)
    z_weight = np.exp(-(z**2) / 2)
    log_weight = (degrees - 1) * np.log(spread) - degrees * spread**2 / 2
    spread_weight = np.exp(log_weight - log_weight.max())
    normal = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))
    grid = np.linspace(-20, 40, 6001)
    below = np.interp(z[:, None] + math.sqrt(2) * value * spread[None, :], grid, normal(grid)) ** num_others
    inside = z_weight @ below @ spread_weight / (z_weight.sum() * spread_weight.sum())
    # 200,000 samples: three standard errors of a probability of 0.025
    assert 1 - inside == pytest.approx(0.025, abs=0.00105)


def test_for_one_other_the_critical_value_is_students() -> None:
    # the spread of a quantile from 200,000 samples
    assert many_to_one(1, 10) == pytest.approx(t_quantile(10), abs=0.02)
