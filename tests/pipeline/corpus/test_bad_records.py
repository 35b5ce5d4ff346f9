from __future__ import annotations

import logging

import pytest

from capgap.pipeline.corpus.bad_records import NUM_NAMED, BadRecords
from capgap.schemas.errors import BadRecordError, InputError


def _error(number: int) -> BadRecordError:
    return BadRecordError("no text", where=f"a.jsonl:{number}", fix="set corpus.text_field, or leave it out for text")


def test_the_first_bad_record_stops_in_the_words_of_the_section() -> None:
    with pytest.raises(BadRecordError, match=r"^tune.sources: a.jsonl:1: no text; set tune.text_field$"):
        BadRecords("tune", "stop", 0.5).refuse(_error(1))


def test_skipped_records_are_counted_and_the_first_are_named(caplog: pytest.LogCaptureFixture) -> None:
    bad = BadRecords("corpus", "skip", 0.1)
    bad.num_records = 1000
    with caplog.at_level(logging.WARNING, "capgap"):
        for number in range(50):
            bad.refuse(_error(number))
        bad.finish()
    assert bad.num_bad == 50
    named = [message for message in caplog.messages if "a.jsonl:" in message]
    assert named[0] == "left out record 1, corpus.sources: a.jsonl:0: no text" and len(named) == NUM_NAMED
    assert caplog.messages[-1].startswith(
        "corpus: left out 50 of 1,000 records that cannot be used, of which the first"
    )


def test_too_large_a_share_is_refused_in_any_case() -> None:
    bad = BadRecords("corpus", "skip", 0.01)
    for number in range(2):
        bad.refuse(_error(number))
    bad.num_records = 200
    bad.finish()
    bad.num_records = 199
    with pytest.raises(InputError, match=r"too many records cannot be used; found 2 of 199 records, first corpus"):
        bad.finish()
