from __future__ import annotations

import numpy as np
import pytest

from capgap.pipeline.cache.convert import to_requests
from capgap.pipeline.cache.request_checks import require_kept, require_scorable
from capgap.pipeline.cache.scoring import Recording, Request
from capgap.schemas.errors import InputError, SettingError

TOKENS_L1 = np.arange(9, dtype=np.int32)


def test_documents_of_any_length_can_be_scored_even_of_one_token_or_with_their_end_in_the_next_sequence() -> None:
    starts_L1 = np.zeros(9, np.bool_)
    starts_L1[[0, 1, 2, 7, 8]] = True
    requests = to_requests(TOKENS_L1, starts_L1, "document")
    assert [len(request.tokens_L1) - 1 for request in requests] == [1, 1, 5, 1]
    require_scorable(requests, 9, 5)


def test_what_cannot_be_scored_is_named_sequence_or_document() -> None:
    sequence, document = Request(TOKENS_L1), Request(TOKENS_L1, b"\x12\x34" * 8)
    with pytest.raises(InputError, match=rf"sequence {sequence.digest.hex()[:12]}, token 8: .*found 8, expected 0 to"):
        require_scorable([sequence], 8, None)
    with pytest.raises(InputError, match=r"document 123412341234: .*found 8 tokens before the last, expected at most"):
        require_scorable([document], 9, 7)
    with pytest.raises(InputError, match="nothing to be scored; found 1 tokens, expected at least 2"):
        require_scorable([sequence, Request(TOKENS_L1[:1])], 9, None)


@pytest.mark.parametrize("kind", ["topk", "both"])
def test_as_many_ids_as_the_vocabulary_has_can_be_kept_and_no_more(recording, kind: str) -> None:
    _require_kept(recording(kind, 300))
    with pytest.raises(SettingError, match=r"cache\.top_k: .*found 301, expected at most 300"):
        _require_kept(recording(kind, 301))


def test_more_draws_than_ids_are_no_fault(recording) -> None:
    _require_kept(recording("sampled", 500))


def _require_kept(recording: Recording) -> None:
    require_kept(recording.top_k, recording.vocab_size)
