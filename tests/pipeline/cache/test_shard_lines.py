from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from capgap.pipeline.cache.shard_lines import device_memory_bytes
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.workflow.carry_out import carry_out

LINE = re.compile(
    r"cache: shard \d+, \d+ of \d+: [\d,]+ tokens, [\d.]+ bytes/token, [\d,]+ tokens/s, \d+ s left, [\d.]+ GB on cpu"
)


def test_every_shard_is_a_line_that_says_what_it_holds_and_how_long_the_rest_takes(run, inputs, caplog) -> None:
    tiny = run(num_samples=7)
    with caplog.at_level(logging.INFO, logger="capgap"):
        manifest = carry_out(tiny, Instance("cache"))
    records = [record for record in caplog.records if getattr(record, "event", "") == "shard"]
    shards = manifest.shard_sets["sampled"].shards
    assert sorted(record.fields["shard"] for record in records) == list(range(len(shards)))
    assert [record.fields["num_done"] for record in records] == list(range(1, len(shards) + 1))
    assert all(LINE.fullmatch(record.getMessage()) for record in records)
    for record in records:
        fields, shard = record.fields, shards[record.fields["shard"]]
        assert fields["num_tokens"] == shard.num_sequences * manifest.shard_sets["sampled"].seq_len
        assert fields["num_bytes"] == shard.file.num_bytes and fields["num_shards"] == len(shards)
        assert fields["bytes_per_token"] == pytest.approx(fields["num_bytes"] / fields["num_tokens"], abs=1e-3)
        assert fields["tokens_per_s"] > 0 and (fields["device"], fields["device_memory_bytes"] > 0) == ("cpu", True)
    assert records[-1].fields["eta_s"] == 0 and records[0].fields["eta_s"] > 0

    # a shard that is there is not said again
    (Path(tiny.out) / "cache" / "manifest.json").unlink()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="capgap"):
        carry_out(run(num_samples=7), Instance("cache"))
    again = [record for record in caplog.records if getattr(record, "event", "") == "shard"]
    assert len(again) == len(shards), "the work folder is gone, and with it what vouched for the shards"


def test_the_memory_of_a_device_is_what_this_process_holds_of_a_machine_s() -> None:
    held = device_memory_bytes("cpu")
    assert held is not None and 1e7 < held < 1e12
    assert device_memory_bytes("") is None
