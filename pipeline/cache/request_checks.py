"""Checks of recordings and requests that every engine needs."""

from __future__ import annotations

from collections.abc import Sequence

from capgap.pipeline.cache.scoring import Request
from capgap.schemas.errors import InputError, SettingError


def require_kept(top_k: int, vocab_size: int) -> None:
    """Raise SettingError where `top_k` is larger than the vocabulary."""
    if top_k > vocab_size:
        raise SettingError(
            "more ids than the vocabulary has",
            where="cache.top_k",
            found=top_k,
            expected=f"at most {vocab_size}",
        )


def require_scorable(requests: Sequence[Request], vocab_size: int, max_targets: int | None) -> None:
    """Raise InputError for the first request that the teacher cannot score.

    Args:
        requests: requests of L + 1 tokens each.
        vocab_size: number of real ids; ids at or past it are not tokens.
        max_targets: the largest L that the teacher can score; None for no limit.
    """
    for request in requests:
        tokens_L1 = request.tokens_L1
        if len(tokens_L1) < 2:
            raise InputError(
                "nothing to be scored", where=request.name, found=f"{len(tokens_L1)} tokens", expected="at least 2"
            )
        if max_targets is not None and len(tokens_L1) - 1 > max_targets:
            raise InputError(
                "longer than the teacher's positions allow",
                where=request.name,
                found=f"{len(tokens_L1) - 1} tokens before the last",
                expected=f"at most {max_targets}",
                fix="lower corpus.seq_len",
            )
        outside = (tokens_L1 < 0) | (tokens_L1 >= vocab_size)
        if outside.any():
            place = int(outside.argmax())
            raise InputError(
                "an id outside the vocabulary",
                where=f"{request.name}, token {place}",
                found=int(tokens_L1[place]),
                expected=f"0 to {vocab_size - 1}",
                fix="make the corpus with the teacher's tokenizer",
            )
