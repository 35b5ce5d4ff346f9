"""Judges a curve as interior, saturating, edge or flat.

Let teachers be ordered along an axis. *Start* and *end* are the teachers at its first and last place (several where
they share a place), and *best* is the teacher with the lowest mean loss. *Worse* means worse by more than the threshold
of :class:`~capgap.pipeline.law.contrasts.Contrasts`, which noise alone exceeds at one end with probability 0.025, for
any number of teachers. `delta` is the larger of `min_delta` (0.005 nats) and one standard error of a difference.

interior    every teacher at the start and every teacher at the end is worse than the best
saturating  the start is worse than the best, the end is not, and a teacher before the end is within delta of the end
edge        the start is worse and the end is not, and no teacher before the end is within delta of it, so the loss
            still falls; or the end is worse and the start is not, so the smallest teachers are as good as any
flat        neither end is worse than the best

Only an interior curve has a best teacher that the data show. Saturating means that any teacher from some place on is
as good, edge that teachers beyond an end should be tried, and flat that no difference was seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from capgap.pipeline.law.contrasts import POWER_ERRORS, Contrasts
from capgap.schemas.law_curve import Verdict
from capgap.schemas.results import Interval

Array = npt.NDArray[np.float64]

MIN_DELTA = 0.005
"""Difference in nats/token below which the choice between two teachers does not matter in use."""


@dataclass(frozen=True)
class Judged:
    """A verdict and its reason.

    Attributes:
        verdict: The verdict.
        reason: The reason in words.
        bracket: For an interior curve, the nearest places on both sides of the best teacher whose teachers are worse;
            None for other curves.
        limit: What the data lack for an interior verdict, in words; None for an interior curve.
    """

    verdict: Verdict
    reason: str
    bracket: Interval | None
    limit: str | None = None


def delta_of(found: Contrasts, min_delta: float = MIN_DELTA) -> float:
    """Return the difference up to which two teachers count as equally good, nats/token."""
    return max(min_delta, found.standard_error)


def judge(places_M: Array, names: tuple[str, ...], found: Contrasts, delta: float) -> Judged:
    """Judge a curve, and say what an interior verdict lacks where the curve is not interior.

    Args:
        places_M: Places of the teachers on the axis, in any order.
        names: Names of the teachers.
        found: Means and noise of the teachers.
        delta: Difference up to which teachers count as equally good, from :func:`delta_of`.
    """
    judged = _verdict(places_M, names, found, delta)
    if judged.verdict == "interior":
        return judged
    above_M = found.means_M - found.means_M.min()
    lacking = [
        lack
        for end in (places_M.min(), places_M.max())
        if (lack := _lack(above_M, places_M == end, names, found)) is not None
    ]
    return replace(judged, limit="; ".join(lacking))


def _lack(above_M: Array, end_M: npt.NDArray[np.bool_], names: tuple[str, ...], found: Contrasts) -> str | None:
    """Return what is lacking to show that the teachers at one end are worse than the best; None where it is shown."""
    at_end = int(np.flatnonzero(end_M)[np.argmin(above_M[end_M])])
    above = float(above_M[at_end])
    if above > found.threshold:
        return None
    if above == 0:
        return f"{names[at_end]}, at an end, is the best itself: teachers beyond it are needed, and not more seeds"
    errors, needed = above / found.standard_error, found.threshold / found.standard_error
    # with more seeds the threshold is a little lower, which is too little to be worth a simulation
    seeds = math.ceil(found.num_seeds * ((needed + POWER_ERRORS) / errors) ** 2)
    return (
        f"{names[at_end]} is worse than the best by {errors:.1f} standard errors, {needed:.1f} are needed: about "
        f"{seeds:.4g} seeds in place of {found.num_seeds} would show it 4 times in 5, if the difference is as measured"
    )


def _verdict(places_M: Array, names: tuple[str, ...], found: Contrasts, delta: float) -> Judged:
    means_M = found.means_M
    best = int(np.argmin(means_M))
    above_M = means_M - means_M[best]
    start_M, end_M = places_M == places_M.min(), places_M == places_M.max()
    fall, rise = float(above_M[start_M].min()), float(above_M[end_M].min())
    falls, rises = fall > found.threshold, rise > found.threshold
    start, end = (
        " and ".join(n for n, is_there in zip(names, mask, strict=True) if is_there) for mask in (start_M, end_M)
    )
    noise = f"noise reaches {found.threshold:.4f}"
    if falls and rises:
        worse_M = above_M > found.threshold
        return Judged(
            "interior",
            f"{names[best]} is best: {start} is worse by {fall:.4f} nats and {end} by {rise:.4f}; {noise}",
            Interval(
                low=float(places_M[worse_M & (places_M < places_M[best])].max()),
                high=float(places_M[worse_M & (places_M > places_M[best])].min()),
            ),
        )
    if falls:
        end_loss = float(means_M[end_M].min())
        as_good_M = ~end_M & (means_M <= end_loss + delta)
        if as_good_M.any():
            first = names[int(np.flatnonzero(as_good_M)[np.argmin(places_M[as_good_M])])]
            reason = (
                f"{start} is worse than the best by {fall:.4f} nats ({noise}), but from {first} on nothing is gained "
                f"beyond delta = {delta:.4f}, and {end} is not shown to be worse than the best ({rise:.4f})"
            )
            return Judged("saturating", reason, None)
        reason = f"the loss still falls at {end}: every other teacher is worse than it by more than delta = {delta:.4f}"
        return Judged("edge", f"{reason}; teachers beyond it were not tried", None)
    if rises:
        reason = f"{start} is not shown to be worse than the best ({fall:.4f} nats; {noise}), {end} is, by {rise:.4f}"
        return Judged("edge", f"{reason}; teachers before {start} were not tried", None)
    reason = f"neither {start} ({fall:.4f} nats above the best) nor {end} ({rise:.4f}) is worse beyond noise"
    return Judged("flat", f"{reason}, which reaches {found.threshold:.4f}", None)
