"""Each form finds itself again, its lowest point is the lowest, and leave-one-out chooses the right one."""

from __future__ import annotations

import numpy as np
import pytest

from capgap.pipeline.law.forms import FORMS, fit, leave_one_out

U = np.linspace(0, 1, 8)
DENSE = np.linspace(0, 1, 20001)

# shapes lie on the grids that are searched
TRUE = {
    "flat": ([3.0], 0.0),
    "saturating": ([3.0, 0.4], float(np.geomspace(0.5, 40.0, 20)[10])),
    "quadratic": ([3.0, -0.4, 0.5], 0.0),
    "cubic": ([3.0, -0.9, 1.9, -0.8], 0.0),
    "decay and rise": ([3.0, 0.4, 0.2], float(np.geomspace(0.5, 40.0, 20)[10])),
    "hinge": ([3.0, -0.4, 0.1], float(np.linspace(U[1], U[-2], 25)[8])),
}


def losses_of(name: str, u: np.ndarray) -> np.ndarray:
    coefficients, shape = TRUE[name]
    return FORMS[name].basis(u, shape) @ np.array(coefficients)


def test_every_form_is_tested() -> None:
    assert set(TRUE) == set(FORMS)


@pytest.mark.parametrize("name", TRUE)
def test_a_form_finds_itself_again(name: str) -> None:
    fits = fit(FORMS[name], U, losses_of(name, U)[None])
    # float64 least squares of well-conditioned matrices
    np.testing.assert_allclose(fits.coefficients_BP[0], TRUE[name][0], rtol=1e-8)
    assert fits.squares_B[0] < 1e-24
    np.testing.assert_allclose(fits.losses_at(DENSE)[0], losses_of(name, DENSE), rtol=1e-9)


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if name != "flat"])
def test_the_lowest_point_is_the_lowest(name: str) -> None:
    rng = np.random.default_rng(3)
    form = FORMS[name]
    fits = fit(form, U, 3.0 + rng.normal(0, 0.1, (200, len(U))))
    curves = fits.losses_at(DENSE)
    lowest = np.array([np.interp(place, DENSE, curve) for place, curve in zip(fits.lowest(), curves, strict=True)])
    # as fine as the dense places can tell, for slopes of up to a few nats over the axis
    np.testing.assert_allclose(lowest, curves.min(1), atol=2e-4)


@pytest.mark.parametrize("name", [name for name in TRUE if name != "flat"])
def test_leave_one_out_chooses_a_form_that_can_draw_the_curve(name: str) -> None:
    rng = np.random.default_rng(0)
    losses = (losses_of(name, U) + rng.normal(0, 1e-4, len(U)))[None]
    errors = {one: float(leave_one_out(form, U, losses)[1][0]) for one, form in FORMS.items()}
    chosen = min(errors, key=lambda one: errors[one])
    # decay and rise holds saturating, cubic holds quadratic; within noise the larger may win
    assert chosen in {name, *{"saturating": ["decay and rise"], "quadratic": ["cubic"]}.get(name, [])}, errors


def test_what_is_left_out_is_not_looked_at() -> None:
    losses = losses_of("quadratic", U)[None].copy()
    fits, _ = leave_one_out(FORMS["quadratic"], U, losses)
    losses[0, 3] += 1.0
    changed, error = leave_one_out(FORMS["quadratic"], U, losses)
    np.testing.assert_array_equal(fits[3].coefficients_BP, changed[3].coefficients_BP)
    assert error[0] > 1.0 / len(U)
