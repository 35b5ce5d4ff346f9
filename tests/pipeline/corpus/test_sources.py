from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from capgap.pipeline.corpus.sources import Document, read_documents
from capgap.schemas.errors import InputError

TEXTS = ["one\nline\n", "zwei \u00fc\u4e2d \U0001f600", '"quoted" \\ and\ttab', "last"]


def _read(*sources: Path | str, field: str = "text") -> list[Document]:
    return list(read_documents(tuple(map(str, sources)), field))


def _texts(*sources: Path | str, field: str = "text") -> list[str]:
    return [document.text for document in _read(*sources, field=field)]


def _jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def _parquet(path: Path, texts: list, field: str = "text") -> None:
    pa.parquet.write_table(pa.table({"id": range(len(texts)), field: texts}), path, row_group_size=2)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".py"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.b{suffix}"
    path.write_bytes("".join(TEXTS).encode())
    assert _read(path) == [Document(str(path), "".join(TEXTS))]


@pytest.mark.parametrize("ascii_only", [True, False])
def test_every_line_of_jsonl_is_a_document(tmp_path: Path, ascii_only: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": text}, ensure_ascii=ascii_only) for text in TEXTS))
    assert _read(path) == [Document(f"{path}:{2 * i + 1}", text) for i, text in enumerate(TEXTS)]


def test_compressed_jsonl_is_read_to_its_end_over_all_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    many = [f"text {number} " * 50 for number in range(3000)]
    frames = (zstandard.compress(_jsonl(many[start : start + 1000])) for start in range(0, 3000, 1000))
    path.write_bytes(b"".join(frames))
    assert _texts(path) == many


@pytest.mark.parametrize("kept", [1, 8, 9, 40, -1, -4, -5])
@pytest.mark.parametrize("checksum", [True, False])
def test_compressed_jsonl_that_ends_early_is_refused(tmp_path: Path, kept: int, checksum: bool) -> None:
    path = tmp_path / "a.jsonl.zst"
    data = zstandard.ZstdCompressor(write_checksum=checksum).compress(_jsonl(TEXTS * 20))
    path.write_bytes(data[:kept])
    with pytest.raises(InputError, match=f"corpus.sources: {path}: cannot be decompressed"):
        _read(path)


@pytest.mark.parametrize("damage", [lambda d: b"{}\n" + d, lambda d: d + b"rest", lambda d: d[:30] + b"\xff" + d[31:]])
def test_damaged_compressed_jsonl_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(damage(zstandard.ZstdCompressor(write_checksum=True).compress(_jsonl(TEXTS))))
    with pytest.raises(InputError, match=f"{path}: cannot be decompressed"):
        _read(path)


def test_every_row_of_parquet_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    _parquet(path, TEXTS)
    assert _read(path) == [Document(f"{path}#{i}", text) for i, text in enumerate(TEXTS)]


def test_the_field_is_the_users_choice(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl(TEXTS, "body"))
    _parquet(tmp_path / "b.parquet", TEXTS, "body")
    assert _texts(tmp_path / "a.jsonl", tmp_path / "b.parquet", field="body") == TEXTS * 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "c.txt").write_text("c")
    (folder / "a.jsonl").write_bytes(_jsonl(["a1", "a2"]))
    (folder / "sub" / "b.md").write_text("b")
    (folder / "picture.png").write_bytes(b"\xff")
    return folder


def test_a_folder_is_all_its_texts_in_the_order_of_their_paths(folder: Path) -> None:
    assert _texts(folder) == ["a1", "a2", "c", "b"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("*.txt", ["c"]), ("**/*.md", ["b"]), ("[ac].*", ["a1", "a2", "c"]), ("?.jsonl", ["a1", "a2"])],
)
def test_a_glob_is_every_file_it_matches_in_order(folder: Path, pattern: str, expected: list[str]) -> None:
    assert _texts(folder / pattern) == expected


def test_sources_follow_one_another_as_they_are_named(folder: Path) -> None:
    assert _texts(folder / "c.txt", folder / "sub", folder / "a.jsonl") == ["c", "b", "a1", "a2"]


def test_texts_without_a_visible_character_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\t\n")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.jsonl").write_bytes(_jsonl(["", " ", "x"]))
    (tmp_path / "d.jsonl").write_bytes(b"")
    assert _texts(tmp_path) == ["x"]


def test_the_builtin_text_is_the_same_every_time_and_large_enough_for_the_demo() -> None:
    first, second = _read("builtin:python"), _read("builtin:python")
    assert first == second
    assert len({document.name for document in first}) == len(first)
    # the demo takes 6 % for the held-out text, which needs thousands of tokens to measure anything
    assert sum(len(document.text) for document in first) > 5_000_000
    names = {document.name for document in first}
    assert {"builtin:python/topics/assert", "builtin:python/json/decoder.py"} <= names
    assert not any("/test/" in name or "site-packages" in name for name in names)


@pytest.mark.parametrize(
    ("name", "data", "where"),
    [
        ("a.txt", b"good \xff bad", "a.txt, byte 5: not valid UTF-8; found 0xff"),
        ("a.md", "\u00fc".encode()[:1], "a.md, byte 0: not valid UTF-8; found 0xc3"),
        ("a.py", "text".encode("utf-16"), "a.py, byte 0: not valid UTF-8; found 0xff, the byte-order mark of UTF-16"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a.jsonl:2, byte 10: not valid UTF-8; found 0xe9"),
        (
            "a.jsonl.zst",
            zstandard.compress(b'{"text": "a"}\n{"text": "\xe9"}\n'),
            r"a.jsonl.zst:2, byte 10: not valid UTF-8; found 0xe9",
        ),
    ],
)
def test_invalid_utf8_names_the_file_and_the_byte(tmp_path: Path, name: str, data: bytes, where: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"corpus.sources: {tmp_path}/{where}, expected UTF-8; convert the file"):
        _read(tmp_path / name)


@pytest.mark.parametrize("text", ['"\\ud800"', '"a \\udfff b"', '"\\ude00\\ud83d"'])
def test_half_a_surrogate_pair_is_refused_by_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "whole \\ud83d\\ude00"}}\n{{"text": {text}}}\n')
    with pytest.raises(InputError, match=f"corpus.sources: {path}:2: the text holds half of a surrogate pair"):
        _read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON record; found Expecting"),
        ("not json", "not a JSON record; found Expecting value"),
        ('{"text": "a"} {"text": "b"}', "not a JSON record; found Extra data"),
        ('{"body": "a", "id": 3}', "no text in field 'text'; found fields body, id, expected a string in 'text'"),
        ('{"text": 3}', "no text in field 'text'; found a number, expected a string in 'text'; remove"),
        (
            '{"text": null}',
            "no text in field 'text'; found null, expected a string in 'text'; remove the record, or set",
        ),
        ('["text"]', "no text in field 'text'; found a list in place of a record"),
        ('"text"', "no text in field 'text'; found a string in place of a record"),
    ],
)
def test_a_wrong_record_names_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n')
    with pytest.raises(InputError, match=f"corpus.sources: {path}:3: {message}"):
        _read(path)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    _parquet(path, TEXTS, "body")
    with pytest.raises(InputError, match=f"{path}: no column 'text'; found id, body, expected text; set corpus.text_f"):
        _read(path)


@pytest.mark.parametrize("values", [["a", None], [1, 2]])
def test_a_parquet_value_that_is_no_text_names_its_row(tmp_path: Path, values: list) -> None:
    _parquet(tmp_path / "a.parquet", values)
    row = values.index(None) if None in values else 0
    with pytest.raises(InputError, match=f"a.parquet#{row}: no text in field 'text'"):
        _read(tmp_path / "a.parquet")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet at all, but long enough to be one"])
def test_what_is_no_parquet_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(InputError, match=r"a.parquet: not a Parquet file"):
        _read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.pdf", ".pdf"), ("a", "no suffix"), ("a.parquet.gz", ".gz"), ("b.zst", ".zst"), ("a.tar.gz", ".gz")],
)
def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path, name: str, suffix: str) -> None:
    (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=f"{name}: unknown kind of file; found {suffix}, expected .txt .md .rst .py"):
        _read(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("missing.txt", "a file, a folder, a glob or builtin:python"),
        ("*.txt", "at least one matching file"),
        ("empty", "files ending in .txt"),
        ("builtin:perl", "a file, a folder, a glob or builtin:python"),
    ],
)
def test_a_source_without_text_is_named(tmp_path: Path, source: str, expected: str) -> None:
    (tmp_path / "empty").mkdir()
    path = source if source.startswith("builtin") else str(tmp_path / source)
    with pytest.raises(InputError) as caught:
        _read(path)
    assert str(caught.value).startswith(f"corpus.sources: {path}: no text found; found nothing, expected {expected}")
