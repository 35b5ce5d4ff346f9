"""The functions that the workflow calls for a stage whose units several processes can share as slices."""

from __future__ import annotations

from capgap.pipeline.corpus.making import make_slice
from capgap.pipeline.corpus.prepare import prepare

__all__ = ["make_slice", "prepare"]
