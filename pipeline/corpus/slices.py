"""What the workflow asks of a stage that several plain processes can share."""

from __future__ import annotations

from capgap.pipeline.corpus.making import make_slice
from capgap.pipeline.corpus.prepare import prepare

__all__ = ["make_slice", "prepare"]
