"""The number of tokens that a finished teacher was trained on, for its cost and for the published laws."""

from __future__ import annotations

from capgap.schemas.manifest import Manifest


def training_tokens(teacher: Manifest) -> int | None:
    """Return the number of tokens that a teacher was trained on from fresh weights.

    It is None for a given teacher, where it is not known, and for an adapted one, whose totals count only the
    adaptation.
    """
    settings, tokens = teacher.settings.get("teacher"), teacher.totals.get("num_tokens")
    is_adapted = isinstance(settings, dict) and settings.get("adapt") is not None
    return tokens if isinstance(tokens, int) and not is_adapted else None
