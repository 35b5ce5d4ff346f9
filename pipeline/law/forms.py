"""Fits functional forms of a student's loss over its teachers by least squares.

Legend: M teachers, B sets of losses that are fitted at once, P coefficients, C shapes of a form (the tried values of
its one nonlinear parameter, `k`).

Every form is linear in its coefficients for a fixed shape. A fit tries a grid of shapes, and solves each exactly by
least squares. The matrices depend on the places of the teachers and not on the losses, which makes thousands of
resampled fits cheap. The axis is `u`: 0 at the first teacher on the axis, 1 at the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# rates of decay over the whole axis: 0.5 is nearly a straight line, 40 has decayed within the first teachers
_RATES = np.geomspace(0.5, 40.0, 20)
_NO_SHAPE = np.zeros(1)
_NUM_KNOTS = 25


@dataclass(frozen=True)
class Form:
    """A functional form.

    Attributes:
        name: Name of the form in reports.
        formula: Formula in `u`, for people.
        num_parameters: Number of coefficients, plus one if the form has a shape.
        has_valley: Whether the lowest point can lie between the ends.
        shapes: Function from the teachers' places [M] to the shapes that are tried [C].
        basis: Function from places [..., M] and a shape to the columns [..., M, P] of the least-squares problem.
        lowest: Function from coefficients [..., P] and shapes [...] to the place of the lowest point, from 0 to 1.
    """

    name: str
    formula: str
    num_parameters: int
    has_valley: bool
    shapes: Callable[[Array], Array]
    basis: Callable[[Array, float], Array]
    lowest: Callable[[Array, Array], Array]

    @property
    def min_teachers(self) -> int:
        """Fewest teachers for a fit: with one of them left out, more teachers than parameters remain."""
        return self.num_parameters + 2


@dataclass(frozen=True)
class Fits:
    """The fits of one form to B sets of losses; `squares_B` holds the sums of squared residuals."""

    form: Form
    coefficients_BP: Array
    shapes_B: Array
    squares_B: Array

    def lowest(self) -> Array:
        """Return the place of each fit's lowest point [B]."""
        return self.form.lowest(self.coefficients_BP, self.shapes_B)

    def losses_at(self, u_M: Array) -> Array:
        """Return the fitted losses [B, M] at places [M], nats/token."""
        values = [
            self.form.basis(u_M, float(shape)) @ row
            for row, shape in zip(self.coefficients_BP, self.shapes_B, strict=True)
        ]
        return np.stack(values)


def fit(form: Form, u_M: Array, losses_BM: Array) -> Fits:
    """Fit a form to each set of losses, with the best of the form's shapes."""
    shapes_C, columns_CMP, solve_CPM = _solvers(form.name, tuple(u_M))
    coefficients_CBP = losses_BM @ solve_CPM.transpose(0, 2, 1)
    residuals_CBM = losses_BM - coefficients_CBP @ columns_CMP.transpose(0, 2, 1)
    squares_CB = np.einsum("cbm,cbm->cb", residuals_CBM, residuals_CBM)
    best_B = np.argmin(squares_CB, axis=0)
    rows = np.arange(len(losses_BM))
    return Fits(form, coefficients_CBP[best_B, rows], shapes_C[best_B], squares_CB[best_B, rows])


def leave_one_out(
    form: Form, u_M: Array, losses_BM: Array, *, between_the_ends: bool = False
) -> tuple[list[Fits], Array]:
    """Fit a form without each teacher in turn, and return the fits and their mean squared errors at that teacher [B].

    With `between_the_ends`, the error is the mean over the teachers between the ends only. An interior curve is lowest
    there, and a form that predicts an end badly can still be right between the ends.
    """
    fits, squares_B = [], np.zeros(len(losses_BM))
    counted_M = (u_M > 0) & (u_M < 1) if between_the_ends else np.ones(len(u_M), dtype=np.bool_)
    for out in range(len(u_M)):
        kept = np.arange(len(u_M)) != out
        without = fit(form, u_M[kept], losses_BM[:, kept])
        fits.append(without)
        if counted_M[out]:
            foretold_B = _at_one_place(without, float(u_M[out]))
            squares_B += (foretold_B - losses_BM[:, out]) ** 2 / counted_M.sum()
    return fits, squares_B


def _at_one_place(fits: Fits, u: float) -> Array:
    """Return the fitted losses [B] at one place, without the loop over fits of `Fits.losses_at`."""
    shapes, which_B = np.unique(fits.shapes_B, return_inverse=True)
    columns_CP = np.stack([fits.form.basis(np.array([u]), float(shape))[0] for shape in shapes])
    losses_B: Array = np.einsum("bp,bp->b", fits.coefficients_BP, columns_CP[which_B])
    return losses_B


@lru_cache(maxsize=512)
def _solvers(name: str, places: tuple[float, ...]) -> tuple[Array, Array, Array]:
    form, u_M = FORMS[name], np.array(places)
    shapes_C = form.shapes(u_M)
    columns_CMP = np.stack([form.basis(u_M, float(shape)) for shape in shapes_C])
    solve_CPM = np.asarray(np.linalg.pinv(columns_CMP), dtype=np.float64)
    return shapes_C, columns_CMP, solve_CPM


def _flat(u: Array, shape: float) -> Array:
    return np.ones((*u.shape, 1))


def _saturating(u: Array, rate: float) -> Array:
    return np.stack([np.ones_like(u), np.exp(-rate * u)], axis=-1)


def _quadratic(u: Array, shape: float) -> Array:
    return np.stack([np.ones_like(u), u, u * u], axis=-1)


def _cubic(u: Array, shape: float) -> Array:
    return np.stack([np.ones_like(u), u, u * u, u * u * u], axis=-1)


def _decay_and_rise(u: Array, rate: float) -> Array:
    return np.stack([np.ones_like(u), np.exp(-rate * u), u], axis=-1)


def _hinge(u: Array, knot: float) -> Array:
    return np.stack([np.ones_like(u), np.minimum(u - knot, 0), np.maximum(u - knot, 0)], axis=-1)


def _knots(u_M: Array) -> Array:
    """Return the tried knots, between the second and the last but one place, so that each line has two teachers."""
    places = np.sort(u_M)
    return np.linspace(places[1], places[-2], _NUM_KNOTS)


def _flat_lowest(coefficients: Array, shapes: Array) -> Array:
    return np.full(shapes.shape, np.nan)


def _saturating_lowest(coefficients: Array, shapes: Array) -> Array:
    return np.where(coefficients[..., 1] > 0, 1.0, 0.0)


def _quadratic_lowest(coefficients: Array, shapes: Array) -> Array:
    slope, bend = coefficients[..., 1], coefficients[..., 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        turning = np.clip(-slope / (2 * bend), 0.0, 1.0)
    return np.where(bend > 0, turning, np.where(slope + bend < 0, 1.0, 0.0))


def _cubic_lowest(coefficients: Array, shapes: Array) -> Array:
    slope, bend, third = (coefficients[..., i] for i in (1, 2, 3))
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.sqrt(bend * bend - 3 * third * slope)
        # of two turning points the minimum, where the curve bends upwards
        turning = np.where(third == 0, -slope / (2 * bend), (root - bend) / (3 * third))
    turning = np.where(np.isfinite(turning), np.clip(turning, 0.0, 1.0), 0.0)
    candidates = np.stack([np.zeros_like(turning), turning, np.ones_like(turning)])
    heights = slope * candidates + bend * candidates**2 + third * candidates**3
    lowest: Array = np.take_along_axis(candidates, np.argmin(heights, axis=0)[None], axis=0)[0]
    return lowest


def _decay_and_rise_lowest(coefficients: Array, shapes: Array) -> Array:
    decay, rise = coefficients[..., 1], coefficients[..., 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        turning = np.clip(np.log(decay * shapes / rise) / shapes, 0.0, 1.0)
    falls = decay * (np.exp(-shapes) - 1) + rise < 0
    return np.where((decay > 0) & (rise > 0), turning, np.where(falls, 1.0, 0.0))


def _hinge_lowest(coefficients: Array, shapes: Array) -> Array:
    before, after = coefficients[..., 1], coefficients[..., 2]
    falls = before * shapes + after * (1 - shapes) < 0
    return np.where((before < 0) & (after > 0), shapes, np.where(falls, 1.0, 0.0))


def _none(u_M: Array) -> Array:
    return _NO_SHAPE


def _rates(u_M: Array) -> Array:
    return _RATES


FORMS = {
    form.name: form
    for form in (
        Form("flat", "a", 1, False, _none, _flat, _flat_lowest),
        Form("saturating", "a + b exp(-k u)", 3, False, _rates, _saturating, _saturating_lowest),
        Form("quadratic", "a + b u + c u^2", 3, True, _none, _quadratic, _quadratic_lowest),
        Form("cubic", "a + b u + c u^2 + d u^3", 4, True, _none, _cubic, _cubic_lowest),
        Form("decay and rise", "a + b exp(-k u) + c u", 4, True, _rates, _decay_and_rise, _decay_and_rise_lowest),
        Form("hinge", "a + b min(u - k, 0) + c max(u - k, 0)", 4, True, _knots, _hinge, _hinge_lowest),
    )
}
"""All forms by name. The hinge stands for a broken power law: over small differences in loss, a line in the logarithm
of the size approximates a power of the size."""
