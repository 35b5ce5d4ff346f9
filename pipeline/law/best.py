"""Locates the lowest point of an interior curve, with an interval.

Legend: M teachers, B resampled sets of means.

The interval spans M + 1 intervals: one with all teachers, and one without each of them. Each is the middle 95 % over
resampled means. For each resample the form is chosen anew among the forms with a valley: the one that best predicts
left-out teachers between the ends. The interval thus includes the noise of seeds, the choice of form, and the choice of
the teachers that were tried. A bootstrap of a single form is too narrow and wrong where the curve does not have that
form; `docs/law.md` has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from capgap.pipeline.law.contrasts import Contrasts
from capgap.pipeline.law.forms import FORMS, Form, fit, leave_one_out
from capgap.schemas.law_curve import Best
from capgap.schemas.results import Interval

Array = npt.NDArray[np.float64]

NUM_RESAMPLES = 400
_TAIL = 0.025


def locate(places_M: Array, found: Contrasts, bracket: Interval, num_resamples: int = NUM_RESAMPLES) -> Best:
    """Locate the lowest point of a curve whose verdict is interior.

    Args:
        places_M: Places of the teachers on the axis.
        found: Means and noise of the teachers.
        bracket: Nearest places on both sides of the best teacher whose teachers are worse, from the verdict. Where
            there are too few teachers for a form with a valley, it is the interval, and the best teacher is the value.
        num_resamples: Number of resampled sets of means for the interval.
    """
    start, span = float(places_M.min()), float(np.ptp(places_M))
    u_M = (places_M - start) / span
    valleys = [form for form in FORMS.values() if form.has_valley and form.min_teachers <= len(set(u_M))]
    if not valleys:
        return Best(value=float(places_M[np.argmin(found.means_M)]), interval=bracket, bracket=bracket, forms={})
    means_BM = _resampled(found, _scatter(valleys, u_M, found), num_resamples)
    errors, whole, without = [], [], []
    for form in valleys:
        fits, error_B = leave_one_out(form, u_M, means_BM, between_the_ends=True)
        errors.append(error_B)
        whole.append(fit(form, u_M, means_BM).lowest())
        without.append([one.lowest() for one in fits])
    chosen_B = np.argmin(errors, axis=0)
    rows = np.arange(len(chosen_B))
    whole_B = start + span * np.stack(whole)[chosen_B, rows]
    without_MB = start + span * np.moveaxis(np.array(without), 0, 1)[:, chosen_B, rows]
    ends = [np.quantile(some, [_TAIL, 1 - _TAIL]) for some in (whole_B, *without_MB)]
    value, low, high = float(whole_B[0]), float(min(end[0] for end in ends)), float(max(end[1] for end in ends))
    if not bracket.low < value < bracket.high:
        # the ends of the bracket are teachers that are known to be worse, so the best teacher that was tried is taken
        value = float(places_M[np.argmin(found.means_M)])
        low, high = min(low, value), max(high, value)
    interval = _within(low, high, bracket)
    value = min(max(value, interval.low), interval.high)
    shares = {form.name: float(np.mean(chosen_B[1:] == i)) for i, form in enumerate(valleys)}
    return Best(value=value, interval=interval, bracket=bracket, forms=shares)


def _within(low: float, high: float, bracket: Interval) -> Interval:
    """Return the overlap of the fits' interval and the bracket; the bracket, which needs no form, if there is none."""
    low, high = max(low, bracket.low), min(high, bracket.high)
    return Interval(low=low, high=high) if low < high else bracket


def _scatter(forms: Sequence[Form], u_M: Array, found: Contrasts) -> float:
    """Return the standard deviation of a teacher's mean about the curve, nats/token.

    It is the noise of seeds, or the residual of the chosen form where that is larger: each teacher deviates from the
    curve by chance, and more seeds of the student do not average this out.
    """
    means_1M = found.means_M[None]
    errors = [float(leave_one_out(form, u_M, means_1M, between_the_ends=True)[1][0]) for form in forms]
    chosen = forms[int(np.argmin(errors))]
    left = float(fit(chosen, u_M, means_1M).squares_B[0]) / (len(u_M) - chosen.num_parameters)
    return max(found.noise / math.sqrt(found.num_seeds), math.sqrt(left))


def _resampled(found: Contrasts, scatter: float, num_resamples: int) -> Array:
    """Return the means as measured, followed by resamples with added scatter [1 + num_resamples, M].

    The size of the scatter is resampled too. Resamples are drawn from the pooled noise and not from the seeds, because
    three seeds have only ten different resamples, whose variance is two thirds of the true one.
    """
    rng = np.random.default_rng(0)
    scales_B = np.sqrt(found.degrees / rng.chisquare(found.degrees, num_resamples))
    noise_BM = rng.standard_normal((num_resamples, len(found.means_M)))
    return np.concatenate([found.means_M[None], found.means_M + scatter * scales_B[:, None] * noise_BM])
