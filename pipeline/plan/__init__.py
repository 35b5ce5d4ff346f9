"""Estimate what a run will cost before it is started.

    run file, finished folders --work--> tokens and disk of every stage
    stated, measured or computed --rates--> tokens/s --> device hours
    teacher and student --published, break_even--> the published laws' best teacher; from how many students a cache pays

Nothing is guessed: a figure that nothing supports is left out, and the plan says which option would supply it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capgap.pipeline.plan.plan import make_plan
    from capgap.pipeline.plan.rates import Stated

__all__ = ["Stated", "make_plan"]

_HOMES = {"Stated": "rates", "make_plan": "plan"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that counting costs does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
