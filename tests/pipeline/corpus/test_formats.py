from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from capgap.pipeline.corpus.formats import read_records
from capgap.pipeline.corpus.kinds import kind_of
from capgap.schemas.errors import BadRecordError, InputError

RECORDS = [
    {"text": text, "id": str(n)} for n, text in enumerate(["one\nline", 'zwei "\u00fc\u4e2d"', " a, b\t;", "last"])
]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
BOM = b"\xef\xbb\xbf"


def _csv(separator: str) -> bytes:
    rows = [("text", "id"), *((record["text"].replace('"', '""'), record["id"]) for record in RECORDS)]
    return "".join(f'"{text}"{separator}{number}\r\n' for text, number in rows).encode()


BYTES = {
    ".jsonl": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode(),
    ".ndjson": "\n\n".join(json.dumps(record) for record in RECORDS).encode(),
    ".json": json.dumps(RECORDS, indent=2).encode(),
    "-objects.json": "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
    ".csv": _csv(","),
    ".tsv": _csv("\t"),
}


def _read(path: Path, fields: tuple[str, ...] = ("text", "id")) -> list[Any]:
    return [record for _, record in read_records(path, fields)]


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize("suffix", BYTES)
def test_every_kind_of_records_is_read_packed_or_not_with_a_byte_order_mark_or_not(
    tmp_path: Path, suffix: str, mark: bytes, packed: str
) -> None:
    path = tmp_path / f"a{suffix}{packed}"
    path.write_bytes(PACKERS[packed](mark + BYTES[suffix]))
    assert _read(path) == RECORDS


@pytest.mark.parametrize("packed", PACKERS)
def test_a_packed_text_is_a_document(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"a.md{packed}"
    path.write_bytes(PACKERS[packed](BOM + "# \u00fc".encode()))
    assert list(read_records(path, ())) == [(str(path), "# \u00fc")]


def _arrow_stream(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


TABLES: dict[str, Callable[[Path, pa.Table], None]] = {
    "a.parquet": lambda path, table: pa.parquet.write_table(table, path, row_group_size=2),
    "a.arrow": _arrow_stream,
    "a.feather": lambda path, table: pyarrow.feather.write_feather(table, path),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read_by_the_columns_that_are_wanted(tmp_path: Path, name: str) -> None:
    table = pa.table({"id": [r["id"] for r in RECORDS], "text": [r["text"] for r in RECORDS], "x": [[1]] * 4})
    TABLES[name](tmp_path / name, table)
    assert _read(tmp_path / name) == RECORDS
    assert _read(tmp_path / name, ("text",)) == [{"text": record["text"]} for record in RECORDS]
    with pytest.raises(InputError, match=rf"{name}: no column 'body'; found id, text, x, expected body"):
        _read(tmp_path / name, ("body",))


@pytest.mark.parametrize("name", TABLES)
def test_what_a_table_fills_up_is_taken_away_again(tmp_path: Path, name: str) -> None:
    rows = [{"messages": [{"role": "a", "name": "n"}, {"role": "b"}]}, {"messages": None}]
    TABLES[name](tmp_path / name, pa.Table.from_pylist(rows))
    assert _read(tmp_path / name, ("messages",)) == rows


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("name", TABLES)
def test_a_damaged_table_is_named_or_read_as_it_is(tmp_path: Path, name: str, compression: str) -> None:
    """Flips of single bytes: whatever the reader makes of them is text, or one error that names the file."""
    chance = random.Random(f"{name} {compression}")
    texts = ["".join(chance.choices("abcdef \u00e9", k=60)) for _ in range(300)]
    table, path = pa.table({"text": texts}), tmp_path / name
    if name == "a.parquet":
        pa.parquet.write_table(table, path, compression=compression, row_group_size=100, data_page_size=1000)
    else:
        TABLES[name](path, table)
    data, num_refused = path.read_bytes(), 0
    for _ in range(100):
        damaged = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(damaged) if chance.random() < 0.8 else bytes(damaged[: chance.randrange(len(data))]))
        try:
            _read(path, ("text",))
        except InputError as error:
            assert str(path) in str(error)
            num_refused += 1
    assert num_refused > 10


def test_a_parquet_page_with_another_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pa.parquet.write_table(pa.table({"text": [f"needle {n}" for n in range(9)]}), path, **options)
    path.write_bytes(path.read_bytes().replace(b"needle 4", b"noodle 4"))
    with pytest.raises(InputError, match=r"a.parquet: not a Parquet file, or a damaged one; found .*CRC"):
        _read(path, ("text",))


def test_a_long_list_is_read_piece_by_piece(tmp_path: Path) -> None:
    chance = random.Random(0)
    records = [{"text": "\u4e2d" * chance.randrange(0, 9000), "n": n} for n in range(300)]
    (tmp_path / "a.json").write_text(json.dumps(records, ensure_ascii=False))
    assert _read(tmp_path / "a.json") == records
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * (1 << 21)}, 5, "y"]))
    assert [type(record) for record in _read(tmp_path / "a.json")] == [dict, int, str]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}', "character 14: the list does not end; found the end of the file, expected a comma or ]"),
        ('[{"text": "a"} {"text": "b"}]', "character 15: the list does not end; found {"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "something follows the list; .* name it .jsonl if each line is a record"),
        ('[{"text": "a"}, nothing]', "character 16: not JSON; found Expecting value"),
        ('[{"text": "a"}, ]', "not JSON"),
        ('[{"text": "a', "not JSON; found Unterminated string"),
        ("[" * 100_000, "nested too deeply"),
        ('{"n": ' + "9" * 5000 + "}", "not JSON; found Exceeds the limit"),
        ("[nonsense" + " " * (1 << 20), "not JSON"),
    ],
)
def test_what_is_no_json_is_named_by_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=f"a.json, character .*{message}" if "char" not in message else message):
        _read(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'[{"text": "\xff"}]')
    with pytest.raises(InputError, match=r"a.json: not valid UTF-8; found 0xff"):
        _read(tmp_path / "a.json")


@pytest.mark.parametrize("line", [b"{", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}", b'"\xff"'])
def test_a_line_that_is_no_record_leaves_the_next_one_readable(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    first, bad, last = _read(tmp_path / "a.jsonl")
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert isinstance(bad, BadRecordError) and f"{tmp_path}/a.jsonl:2" in str(bad)


def test_rows_of_separated_values_that_do_not_fit_are_bad_records(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,id\na,1\nb\nc,3\n")
    first, bad, last = _read(tmp_path / "a.csv")
    assert (first, last) == ({"text": "a", "id": "1"}, {"text": "c", "id": "3"})
    assert "a.csv:3: the row's fields do not match the header; found 1 fields, expected 2" in str(bad)
    (tmp_path / "a.csv").write_text('text,id\n"a,1\n')
    with pytest.raises(InputError, match=r"a.csv:\d: cannot be read as separated values; found unexpected end of data"):
        _read(tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("before", ["\n", "\r\n\r\n", "=\n", '""=""\n\n'])
def test_empty_rows_before_the_names_are_passed_over(tmp_path: Path, suffix: str, before: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text(f"{before}text=id\na=1\n".replace("=", "," if suffix == ".csv" else "\t"))
    assert _read(path) == [{"text": "a", "id": "1"}]
    path.write_text(before.replace("=", "," if suffix == ".csv" else "\t"))
    assert _read(path) == []


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ('1\t"say ""hi"""', 'say "hi"'),
        ('1\t"a\tb"', "a\tb"),
        ('1\t"one\ntwo"', "one\ntwo"),
        ('1\t"one\n\n2\ttwo"', "one\n\n2\ttwo"),
        ('1\t"yes" he said', '"yes" he said'),
        ('1\t"yes" and "no"', '"yes" and "no"'),
        ('1\ta 5" nail', 'a 5" nail'),
        ('1\t""', ""),
    ],
)
def test_values_between_tabs_stand_in_quotes_or_hold_them(tmp_path: Path, row: str, text: str) -> None:
    (tmp_path / "a.tsv").write_text(f"id\ttext\n{row}\n2\tlast\n")
    assert _read(tmp_path / "a.tsv") == [{"id": "1", "text": text}, {"id": "2", "text": "last"}]


def test_a_quote_between_tabs_that_only_opens_swallows_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"Hello\n2\tplain\n3\tworld"\n4\tfour\n')
    bad, *others = _read(tmp_path / "a.tsv")
    assert "a.tsv:2: a value begins with a quote that does not end in its line" in str(bad)
    assert [record["text"] for record in others] == ["plain", 'world"', "four"]
    (tmp_path / "a.tsv").write_text('id\ttext\n1\tx\n2\t"open')
    with pytest.raises(InputError, match=r"a.tsv:3: cannot be read as separated values; found unexpected end of data"):
        _read(tmp_path / "a.tsv")


def test_a_cell_of_any_length_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert _read(tmp_path / "a.csv") == [{"text": "x" * 200_000}]


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kept", [1, 20, -1, -9])
def test_a_packed_file_that_ends_early_is_refused(tmp_path: Path, packed: str, kept: int) -> None:
    path = tmp_path / f"a.jsonl{packed}"
    data = PACKERS[packed](BYTES[".jsonl"] * 50)
    path.write_bytes(data[:kept])
    with pytest.raises(InputError, match=f"a.jsonl{packed}: cannot be decompressed"):
        _read(path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.JSONL", ".jsonl"), ("a.json.gz", ".json"), ("a.parquet.gz", None), ("a.tar.gz", None), ("a.pdf", None)],
)
def test_kinds_are_told_by_their_suffixes(name: str, kind: str | None) -> None:
    assert kind_of(Path(name)) == kind
