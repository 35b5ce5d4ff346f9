"""Estimates of text against what is there. Tolerances: a sample's mean is a few per cent off the whole's."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from capgap.pipeline.corpus.amounts import source_texts, text_bytes
from capgap.pipeline.corpus.files import list_places
from capgap.schemas.errors import InputError
from capgap.schemas.run_corpus import CorpusSettings


@pytest.fixture
def texts() -> list[str]:
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefgh\u00e9", k=chance.randrange(2, 9))) for _ in range(500)]
    return [" ".join(chance.choices(words, k=chance.randrange(50, 150))) for _ in range(3000)]


def _bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def test_plain_text_is_counted(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "b.md").write_text(texts[1])
    assert text_bytes(list_places((str(tmp_path),)), "text").value == _bytes(texts[:2])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".json.gz", ".csv", ".parquet", ".arrow"])
def test_records_are_estimated_from_a_sample_and_say_so(tmp_path: Path, texts: list[str], suffix: str) -> None:
    for number in range(4):
        part, path = texts[number::4], tmp_path / f"{number}{suffix}"
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pa.table({"text": part, "id": list(range(len(part)))}), path)
            continue
        if suffix == ".arrow":
            table = pa.table({"text": part, "id": list(range(len(part)))})
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=100)
            continue
        if suffix == ".csv":
            path.write_text("id,text\n" + "".join(f"{i},{t}\n" for i, t in enumerate(part)))
            continue
        lines = "".join(
            json.dumps({"id": i, "text": t}, ensure_ascii=False) + "\n" for i, t in enumerate(part)
        ).encode()
        pack = {".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(lines))
    found = text_bytes(list_places((f"{tmp_path}/*{suffix}",)), "text")
    assert found.value == pytest.approx(_bytes(texts), rel=0.05)
    assert f"4 {suffix} of " in found.source and "by a sample" in found.source


def test_rows_of_a_table_without_text_or_that_cannot_be_used_count_as_rows(tmp_path: Path) -> None:
    rows = ["word " * 40 if number % 10 == 0 else [" ", "", None][number % 3] for number in range(4000)]
    pa.parquet.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"corpus.sources: .*a.parquet#\d+: "):
        text_bytes([tmp_path / "a.parquet"], "text")
    # every tenth of the 200 rows of the sample has text, as of all rows
    assert text_bytes([tmp_path / "a.parquet"], "text", skips=True).value == pytest.approx(400 * 200)


def test_python_s_own_text_is_counted() -> None:
    found = text_bytes(list_places(("builtin:python",)), "text")
    assert found.value is not None and found.value > 1e6 and "counted" in found.source


def test_a_missing_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text found"):
        text_bytes(list_places((str(tmp_path / "absent.txt"),)), "text")


def test_a_file_that_two_sources_name_is_counted_once(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "b.md").write_text(texts[1])
    settings = CorpusSettings(sources=(str(tmp_path / "b.md"), str(tmp_path), str(tmp_path / "a.txt")))
    found, _ = source_texts(settings)
    assert [figure.value for figure in found] == [_bytes(texts[1:2]), _bytes(texts[:1]), 0]
