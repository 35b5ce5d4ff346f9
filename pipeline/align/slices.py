"""What the workflow asks of a stage that several plain processes can share."""

from __future__ import annotations

from capgap.pipeline.align.stage import prepare
from capgap.pipeline.align.units import make_units as make_slice

__all__ = ["make_slice", "prepare"]
