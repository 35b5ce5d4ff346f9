from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from capgap.pipeline.plan import measured
from capgap.schemas.run_cache import CacheSettings

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def test_the_table_is_what_the_kept_results_say() -> None:
    spec = importlib.util.spec_from_file_location("plan_tables", BENCHMARKS / "plan_tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert json.loads(tables.TABLE.read_text()) == tables.table(), "run benchmarks/plan_tables.py"


def test_a_recording_that_was_measured_is_given_as_measured_with_its_source() -> None:
    found = measured.cache_bytes_per_token(CacheSettings(recording="topk"), 32768)
    assert found.value == 117.49
    assert "topk-near-lossless-1, 64 top-k tokens" in found.source and "store-codecs-amd-epyc.json" in found.source
    assert "117.5 to 122.0" in found.source, "the range over sharper teachers"


def test_other_numbers_are_in_proportion_and_say_so() -> None:
    found = measured.cache_bytes_per_token(CacheSettings(recording="sampled", num_samples=100), 32768)
    assert found.value == pytest.approx(2 * 33.08) and "in proportion from 50" in found.source


def test_both_recordings_take_both() -> None:
    both = measured.cache_bytes_per_token(CacheSettings(recording="both"), 32768)
    assert both.value == pytest.approx(33.08 + 117.49)


def test_the_nearest_vocabulary_is_taken_and_the_largest_where_none_is_known() -> None:
    settings = CacheSettings()
    assert measured.cache_bytes_per_token(settings, 4000).value == 38.891
    assert measured.cache_bytes_per_token(settings, 128_000).value == 35.4
    assert measured.cache_bytes_per_token(settings, None).value == 35.4
    assert measured.text_bytes_per_token(4096).value == 3.6361
