from __future__ import annotations

import numpy as np
import pytest

from capgap.pipeline.eval.arms import differences_over_seeds, paired_differences
from capgap.pipeline.eval.intervals import bootstrap_interval, resample_weights, t_interval, t_quantile


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (29, 2.0452), (1000, 1.9623)],
)
def test_t_quantiles_are_those_of_the_printed_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=6e-5)


def test_a_t_interval_is_the_textbook_one():
    mean, interval = t_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * np.std([1, 2, 3, 4], ddof=1) / 2
    assert (mean, interval.low, interval.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))


def test_bootstrap_intervals_cover_the_true_mean():
    rng = np.random.default_rng(0)
    weights_RS = resample_weights(80, 400)
    covered = 0
    for _ in range(300):
        labels_S = rng.integers(10, 30, 80)
        interval = bootstrap_interval(rng.normal(3.0, 0.5, 80) * labels_S, labels_S, weights_RS)
        covered += interval.low <= 3.0 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98  # 95 % nominal; 300 trials have a standard error of 1.3 %


def test_resampling_is_the_same_every_time():
    np.testing.assert_array_equal(resample_weights(9, 5), resample_weights(9, 5))
    assert (resample_weights(9, 5).sum(1) == 9).all()


def test_a_paired_interval_finds_a_gain_that_separate_intervals_hide():
    rng = np.random.default_rng(1)
    labels_S = np.full(200, 10)
    first = rng.normal(30, 8, 200)
    second = first - 0.3 + rng.normal(0, 0.5, 200)
    weights_RS = resample_weights(200, 500)
    (found,) = paired_differences({"a": {0: first}, "b": {0: second}}, labels_S, weights_RS)
    assert (found.first, found.second, found.seed) == ("a", "b", 0)
    assert found.interval.low < 0.03 < found.interval.high
    assert found.interval.low > 0
    separate = [bootstrap_interval(nats, labels_S, weights_RS) for nats in (first, second)]
    assert separate[1].high > separate[0].low


def test_differences_over_seeds_pair_the_seeds():
    labels_S = np.full(3, 10)
    losses = {
        "a": {0: np.full(3, 31.0), 1: np.full(3, 42.0), 5: np.full(3, 53.0)},
        "b": {0: np.full(3, 30.0), 1: np.full(3, 40.0), 5: np.full(3, 50.0)},
        "c": {0: np.full(3, 1.0)},
    }
    paired = paired_differences(losses, labels_S, resample_weights(3, 100))
    assert len(paired) == 5
    (found,) = differences_over_seeds(paired)
    mean, interval = t_interval([0.1, 0.2, 0.3])
    assert (found.first, found.second, found.seeds) == ("a", "b", (0, 1, 5))
    assert (found.difference, found.interval.low, found.interval.high) == pytest.approx(
        (mean, interval.low, interval.high)
    )
