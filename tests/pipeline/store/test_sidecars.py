from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import pytest

from capgap.pipeline.store.sidecars import read_sidecar, write_sidecar
from capgap.schemas.facts import ShardFacts

FACTS = ShardFacts(
    sha256={"topk": "ab" * 32}, engine="none 1", dtype="float32", num_targets=8, num_labels=8, label_loss=1.25
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_sidecar(tmp_path / "000000.json", FACTS)
    return tmp_path / "000000.json"


def test_what_was_written_is_read(path: Path) -> None:
    assert read_sidecar(path, ShardFacts) == FACTS


def test_a_sidecar_is_json_with_the_digest_of_its_record(path: Path) -> None:
    text = path.read_bytes()
    whole = json.loads(text)
    assert whole["record"] == FACTS.model_dump(mode="json")
    record = text.partition(b'"record":')[2][:-1]
    assert whole["sha256"] == hashlib.sha256(record).hexdigest()


def test_one_that_is_not_there_is_none_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_sidecar(tmp_path / "000000.json", ShardFacts) is None
    assert caplog.text == ""


def test_every_byte_of_it_counts_and_damage_is_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sound = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        for place in range(len(sound)):
            path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
            assert read_sidecar(path, ShardFacts) is None, place
    assert f"{path} is damaged: the file that it describes is made again" in caplog.text


@pytest.mark.parametrize("text", [b"", b"{}", b"null", b"\xff", FACTS.model_dump_json().encode()])
def test_what_has_no_digest_is_not_read(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    assert read_sidecar(path, ShardFacts) is None


def test_a_record_of_another_kind_is_not_read(path: Path) -> None:
    body = b'{"num_targets":8}'
    path.write_bytes(b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'","record":' + body + b"}")
    assert read_sidecar(path, ShardFacts) is None
