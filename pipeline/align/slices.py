"""The functions that the workflow calls for a stage whose units several processes can share as slices."""

from __future__ import annotations

from capgap.pipeline.align.stage import prepare
from capgap.pipeline.align.units import make_units as make_slice

__all__ = ["make_slice", "prepare"]
