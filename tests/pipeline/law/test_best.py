"""What the interval of the best teacher holds, beside what `test_planted` counts."""

from __future__ import annotations

import numpy as np

from capgap.pipeline.law.best import locate
from capgap.pipeline.law.contrasts import Contrasts
from capgap.pipeline.plan.published import distilled_loss, supervised_loss
from capgap.schemas.results import Interval

WIDE = Interval(low=-10.0, high=10.0)


def contrasts_of(losses: np.ndarray, noise: float = 0.002) -> Contrasts:
    return Contrasts(losses, noise, degrees=2 * (len(losses) - 1), num_seeds=3)


def test_four_teachers_allow_no_form_and_the_bracket_is_all_there_is() -> None:
    places = np.log([1.0, 2.0, 4.0, 8.0])
    bracket = Interval(low=float(places[0]), high=float(places[2]))
    best = locate(places, contrasts_of(np.array([3.1, 3.0, 3.05, 3.2])), bracket)
    assert best.interval == best.bracket == bracket
    assert best.value == places[1]
    assert best.forms == {}


def test_an_interval_never_leaves_the_bracket() -> None:
    places = np.linspace(0, 3, 6)
    narrow = Interval(low=0.9, high=1.1)
    best = locate(places, contrasts_of(3 + 0.01 * (places - 1) ** 2, noise=0.01), narrow)
    assert narrow.low <= best.interval.low < best.interval.high <= narrow.high


def test_a_fit_that_is_lowest_at_an_end_of_the_bracket_gives_way_to_the_best_teacher_tried() -> None:
    """The teachers at the ends are known to be worse: to call one of these places the best would be wrong."""
    places = np.linspace(0, 3, 6)
    losses = 3 + 0.01 * (places - 1) ** 2
    for bracket in (Interval(low=1.15, high=3.0), Interval(low=0.0, high=0.9)):
        inside = (places > bracket.low) & (places < bracket.high)
        best = locate(places, contrasts_of(np.where(inside, losses - 0.002, losses), 0.0002), bracket)
        assert bracket.low < best.value < bracket.high
        assert best.interval.low <= best.value <= best.interval.high


def test_more_noise_widens_the_interval() -> None:
    places = np.linspace(0, 3, 6)
    losses = 3 + 0.01 * (places - 1.5) ** 2
    quiet, loud = (locate(places, contrasts_of(losses, noise), WIDE).interval for noise in (0.0005, 0.004))
    assert loud.high - loud.low > 3 * (quiet.high - quiet.low)


def test_teachers_that_stray_from_every_form_widen_the_interval() -> None:
    places = np.linspace(0, 3, 8)
    smooth = 3 + 0.01 * (places - 1.5) ** 2
    rough = smooth + 0.003 * np.array([1, -1, 1, -1, -1, 1, -1, 1])
    plain, wide = (locate(places, contrasts_of(losses, 0.0002), WIDE).interval for losses in (smooth, rough))
    assert wide.high - wide.low > 3 * (plain.high - plain.low)


def test_a_form_that_does_not_fit_is_not_used() -> None:
    """A wall on the left and a slow rise: a parabola puts the lowest point at twice its place."""
    ratios = np.geomspace(1, 81, 9)
    losses = [distilled_loss(1e9, 1e11, supervised_loss(ratio * 1e9, 20 * ratio * 1e9)) for ratio in ratios]
    best = locate(np.log(ratios), contrasts_of(np.array(losses)), WIDE)
    assert best.forms["quadratic"] == 0.0
    assert abs(best.value - np.log(9.25)) < abs(best.value - np.log(17.0))


def test_the_same_curve_gives_the_same_interval() -> None:
    places = np.linspace(0, 3, 6)
    found = contrasts_of(3 + 0.01 * (places - 1) ** 2)
    assert locate(places, found, WIDE) == locate(places, found, WIDE)
