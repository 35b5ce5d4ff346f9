"""Power: a difference that is called shown 4 times in 5 is shown that often, and seeds are counted by it."""

from __future__ import annotations

import numpy as np
import pytest
from law_tables import planted, valley

from capgap.pipeline.law.contrasts import POWER, contrasts, seeds_needed, smallest_difference
from capgap.pipeline.law.grid import curves
from capgap.pipeline.law.power import powers, upper_limit
from capgap.pipeline.law.sizes import Sizes
from capgap.schemas.law import LawModel
from capgap.schemas.law_grid import LawGrid

NOISE = 0.01


@pytest.mark.parametrize(("num_teachers", "num_seeds"), [(3, 5), (6, 4), (6, 16)])
def test_the_stated_difference_is_shown_as_often_as_stated(num_teachers: int, num_seeds: int) -> None:
    """One teacher is best, the others are worse by the stated difference; the last of them is judged as an end is."""
    rng = np.random.default_rng(0)
    true_M1 = np.full((num_teachers, 1), smallest_difference(NOISE, num_teachers, num_seeds))
    true_M1[0] = 0
    shown = []
    for _ in range(1000):
        luck_R = rng.normal(0, 1, num_seeds)
        found = contrasts(true_M1 + luck_R + rng.normal(0, NOISE, (num_teachers, num_seeds)))
        shown.append(found.means_M[-1] - found.means_M.min() > found.threshold)
    # 1000 tables: a standard error of 0.013; few degrees of freedom cost up to 0.03, for a quantile is the normal one
    assert np.mean(shown) == pytest.approx(POWER, abs=0.05)


def test_seeds_are_the_fewest_that_show_the_difference() -> None:
    needed = seeds_needed(NOISE, 6, 0.01)
    assert needed is not None
    assert smallest_difference(NOISE, 6, needed) <= 0.01 < smallest_difference(NOISE, 6, needed - 1)
    assert seeds_needed(NOISE, 6, 1e-5) is None
    assert seeds_needed(NOISE, 6, 1.0) == 2


def test_the_upper_limit_of_the_noise_holds_it_nine_times_in_ten() -> None:
    rng = np.random.default_rng(1)
    for degrees in (4, 16):
        noises = NOISE * np.sqrt(rng.chisquare(degrees, 4000) / degrees)
        covered = np.mean([upper_limit(float(noise), degrees) > NOISE for noise in noises])
        assert covered == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    # lower tenths of chi-squared variables, as tables have them
    [(1, 0.0157907741), (2, 0.2107210313), (3, 0.5843743742), (4, 1.0636232168), (10, 4.8651820519), (100, 82.3581358)],
)
def test_the_upper_limit_of_the_noise_is_exact_for_few_degrees_of_freedom_too(degrees: int, quantile: float) -> None:
    assert upper_limit(1.0, degrees) == pytest.approx((degrees / quantile) ** 0.5, rel=1e-7)


def test_a_grid_takes_the_noise_of_the_pilots_nearest_student() -> None:
    def named(count: int) -> LawModel:
        return LawModel(name=f"s{count}", num_parameters=count, num_non_embedding_parameters=count)

    shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}
    names = ["t1", "t2", "t3", "t4"]
    grid = LawGrid.model_validate(
        {
            "name": "g",
            "out": "g",
            "seeds": [0, 1, 2, 3],
            "teachers": {name: {"model": shape} for name in names},
            "students": {"s1500000": {"model": shape}, "s9000000": {"model": shape}},
            "budgets": {"b": {"tokens": 10}},
        }
    )
    sizes = Sizes({f"s{count}": named(count) for count in (1_500_000, 9_000_000)}, {})
    ratios = np.geomspace(1, 32, 6).tolist()
    quiet, loud = (planted(valley(4.0), [size], ratios, noise=noise) for size, noise in ((1e6, 0.001), (8e6, 0.01)))
    small, large = powers(grid, sizes, curves((*quiet, *loud)), 0.01)
    assert small.pilot.startswith("m1000000,") and large.pilot.startswith("m8000000,")
    assert small.noise < large.noise / 3 and small.size_ratio == 1.5
    assert large.smallest == smallest_difference(large.noise, 4, 4)
    assert large.smallest_cautious > large.smallest and large.seeds_needed == seeds_needed(large.noise, 4, 0.01)
    alone = grid.model_copy(update={"seeds": (0,)})
    assert powers(alone, sizes, curves(quiet), 0.01)[0].smallest is None
    assert powers(grid, sizes, (), 0.01) == ()
