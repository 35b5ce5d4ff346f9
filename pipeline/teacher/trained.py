"""On how much text a finished teacher was trained: what it cost, and what the published laws ask of it."""

from __future__ import annotations

from capgap.schemas.manifest import Manifest


def training_tokens(teacher: Manifest) -> int | None:
    """Tokens that a teacher was trained on from fresh weights.

    None where that is not known: of a given teacher, and of an adapted one, whose totals count the adaptation alone.
    """
    settings, tokens = teacher.settings.get("teacher"), teacher.totals.get("num_tokens")
    is_adapted = isinstance(settings, dict) and settings.get("adapt") is not None
    return tokens if isinstance(tokens, int) and not is_adapted else None
