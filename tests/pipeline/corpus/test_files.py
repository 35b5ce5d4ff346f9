from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from capgap.pipeline.corpus.files import folders_in_words, list_files, list_places, places_by_source
from capgap.pipeline.corpus.listing import list_units
from capgap.pipeline.corpus.sources import read_documents
from capgap.schemas.errors import InputError
from capgap.schemas.run_corpus import CorpusSettings


def _names(*sources: Path | str) -> list[str]:
    return [path.name for path in list_files(tuple(map(str, sources)))]


def _make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "x"}' if ".json" in name else "text")
    return folder


@pytest.mark.parametrize("name", ["my [file] 1.jsonl", "[ab].jsonl", "what?.jsonl", "all*.jsonl"])
def test_a_path_that_exists_is_that_path(tmp_path: Path, name: str) -> None:
    _make(tmp_path, name, "a.jsonl")
    assert _names(tmp_path / name) == [name]


def test_folders_before_a_pattern_are_taken_as_they_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path, "my [data]/a.jsonl", "my [data]/in [it]/b.jsonl", "my a/c.jsonl")
    assert _names(tmp_path / "my [data]" / "*.jsonl") == ["a.jsonl"]
    assert _names(tmp_path / "my [data]" / "**" / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in list_files(("my [data]/in [it]/*.jsonl",))] == ["my [data]/in [it]/b.jsonl"]


def test_hidden_files_licences_and_dataset_cards_are_no_text_of_a_folder(tmp_path: Path) -> None:
    folder = _make(
        tmp_path / "set", "README.md", "LICENSE.txt", "COPYING.md", "data/a.jsonl", "data/b.json", "c.jsonl.gz",
        ".cache/x.jsonl", ".git/description.txt", ".hidden.txt", "data/notes.txt", "dataset_infos.json", "x.png",
    )  # fmt: skip
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}'))
    assert _names(folder) == ["c.jsonl.gz", "a.jsonl", "b.json", "notes.txt"]
    assert [document.text for document in read_documents((str(folder),), "text")] == ["packed", "x", "x", "text"]
    assert folders_in_words((str(folder), str(folder / "x.png"))) == [
        f"{folder}: read 1 .json, 1 .jsonl, 1 .jsonl.gz, 1 .txt; not read: 3 .txt, 2 .md, 1 .json, 1 .jsonl, 1 .png"
    ]


def test_a_readme_among_texts_is_text(tmp_path: Path) -> None:
    assert _names(_make(tmp_path / "docs", "README.md", "more/page.md")) == ["README.md", "page.md"]
    assert folders_in_words((str(tmp_path / "docs"),)) == [f"{tmp_path}/docs: read 2 .md; nothing else"]


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_of_save_to_disk_is_its_data(tmp_path: Path, splits: bool) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": [f"text {number}" for number in range(50)]})
    if splits:
        made = made.train_test_split(0.2, seed=0)
    made.save_to_disk(str(tmp_path / "saved"), **({} if splits else {"num_shards": 3}))
    (tmp_path / "saved" / "cache-0123.arrow").write_bytes(b"left behind by a map")
    if splits:
        (tmp_path / "saved" / "cache-0123.arrow").unlink()
    found = [document.text for document in read_documents((str(tmp_path / "saved"),), "text")]
    assert sorted(found) == sorted(f"text {number}" for number in range(50))


def test_a_state_that_says_nothing_leaves_files_alone(tmp_path: Path) -> None:
    folder = _make(tmp_path, "a.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": 3}))
    assert _names(folder) == ["a.arrow"]


def test_the_character_zero_in_a_source_is_refused() -> None:
    with pytest.raises(InputError, match=r"corpus.sources: 'a\\x00.txt': no text found"):
        list_files(("a\0.txt",))


def test_a_file_is_read_once_whatever_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _make(tmp_path, "data/a.jsonl", "data/b.jsonl")
    (folder / "link.jsonl").symlink_to(folder / "data" / "b.jsonl")
    monkeypatch.chdir(tmp_path)
    again = (str(folder / "data" / "a.jsonl"), "data/*.jsonl", "link.jsonl", "builtin:python")
    assert [str(place) for place in list_places(("data/b.jsonl", "builtin:python", str(folder / "data"), *again))] == [
        "data/b.jsonl",
        "builtin:python",
        str(folder / "data" / "a.jsonl"),
    ]
    assert len(list(read_documents(("data", "data/a.jsonl", "link.jsonl"), "text"))) == 2


def test_a_file_that_a_list_of_sources_names_again_belongs_to_the_first(tmp_path: Path) -> None:
    folder = _make(tmp_path, "a.jsonl", "b.jsonl")
    settings = CorpusSettings(sources=(str(folder / "b.jsonl"), str(folder), str(folder / "a.jsonl")))
    assert places_by_source(settings) == [[folder / "b.jsonl"], [folder / "a.jsonl"], []]
    assert [file.source for file in list_units(settings).files] == [0, 1]


def test_a_text_in_two_sources_of_a_mixture_is_refused_by_their_names(tmp_path: Path) -> None:
    folder = _make(tmp_path, "a.jsonl", "b.txt")
    web, code = {"paths": [str(folder)], "weight": 3}, {"paths": [str(folder / "*.jsonl")], "text_field": "body"}
    settings = {"mixture": {"web": web, "code": code}, "tokenizer": "x"}
    found = places_by_source(CorpusSettings.model_validate(settings))
    assert found == [[folder / "a.jsonl", folder / "b.txt"], [folder / "a.jsonl"]], "other fields hold other texts"
    said = (
        r"corpus.mixture.code: .*a.jsonl: two sources of the mixture name the same text; found the same text in "
        r"corpus.mixture.web,"
    )
    for changed in ({"messages_field": "auto"}, {"text_field": "body"}):
        with pytest.raises(InputError, match=said):
            places_by_source(CorpusSettings.model_validate(settings | changed))
    code["paths"] = [str(folder / "b.txt")]
    with pytest.raises(InputError, match=said.replace("a.jsonl", "b.txt")):
        list_units(CorpusSettings.model_validate(settings))
