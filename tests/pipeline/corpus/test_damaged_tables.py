"""Damaged Parquet and Arrow files: rows that are as they were written, or one error that names the file.

`CAPGAP_TABLES` says how many damaged files are read, `CAPGAP_SEED` chooses others.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from tiny_limits import bounded_memory

from capgap.pipeline.corpus.tables import num_rows, table_rows
from capgap.schemas.errors import InputError

NUM = int(os.environ.get("CAPGAP_TABLES", "300"))
SEED = int(os.environ.get("CAPGAP_SEED", "5"))
FIELDS = ("text", "messages")
# above what the process has: a length that is believed asks for more
MORE_BYTES = 4 << 30


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    with bounded_memory(MORE_BYTES):
        yield


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same rows in every way in which they are commonly written."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [
        {"text": f"The {n}th of all texts. " * (n % 7), "messages": [{"role": "user", "content": f"say {n}"}] * (n % 3)}
        for n in range(300)
    ]
    table, paths = pa.Table.from_pylist(rows), []
    for compression in ("none", "snappy", "zstd", "gzip"):
        for dictionary in (False, True):
            for checksum in (False, True):
                path = folder / f"{compression}-{dictionary}-{checksum}.parquet"
                options: dict[str, Any] = {"use_dictionary": dictionary, "write_page_checksum": checksum}
                options |= {"data_page_size": 800, "row_group_size": 100, "compression": compression}
                pa.parquet.write_table(table, path, **options)
                paths.append(path)
    for compression in ("uncompressed", "lz4", "zstd"):
        paths.append(folder / f"{compression}.feather")
        pa.feather.write_feather(table, paths[-1], compression=compression)
    return paths


def test_no_damaged_table_is_more_than_one_error(tables: list[Path], tmp_path: Path) -> None:
    chance, found = random.Random(SEED), Counter[str]()
    for number in range(NUM):
        path = chance.choice(tables)
        data = bytearray(path.read_bytes())
        # a third each in pages, in the footer, and cut off
        where = range(4, len(data) - 8) if chance.random() < 0.6 else range(max(4, len(data) - 2500), len(data))
        for _ in range(chance.choice([1, 1, 3, 20])):
            data[chance.choice(where)] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        if chance.random() < 0.1:
            data = data[: chance.randrange(len(data))]
        spoilt = tmp_path / f"damaged{path.suffix}"
        spoilt.write_bytes(data)
        for read in (num_rows, _all_rows):
            try:
                read(spoilt)
                found["read"] += 1
            except InputError as error:
                assert str(spoilt) in str(error)
                found["refused"] += 1
            except BaseException as error:
                pytest.fail(f"CAPGAP_SEED={SEED}, number {number} of {path.name}: {error!r}")
    assert found["refused"] > NUM / 4
    print(f"{NUM} damaged tables, seed {SEED}: {dict(found)}")


def _all_rows(path: Path) -> list[Any]:
    return list(table_rows(path, FIELDS))
