"""Small files of a finished folder, from a local disk and from a web server."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from capgap.pipeline.store import fetched, folder_with
from capgap.pipeline.store.files import sha256_of
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.manifest import FileEntry

NAMES = ("tokenizer/a.json", "tokenizer/more/b.txt")


@pytest.fixture(params=["local", "http"])
def location(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Path], str]) -> Path | str:
    """Of a folder with two small files."""
    monkeypatch.setenv("CAPGAP_DOWNLOADS", str(tmp_path / "downloads"))
    folder = tmp_path / "made"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    return folder if request.param == "local" else serve(folder)


def _entries(folder: Path) -> list[FileEntry]:
    return [FileEntry(path=n, num_bytes=(folder / n).stat().st_size, sha256=sha256_of(folder / n)) for n in NAMES]


def test_the_files_stand_in_a_local_folder_under_their_names(location: Path | str, tmp_path: Path) -> None:
    found = folder_with(location, _entries(tmp_path / "made"))
    assert [(found / name).read_text() for name in NAMES] == [f"this is {name}" for name in NAMES]
    assert (found == location) == isinstance(location, Path)


def test_they_are_looked_at_once_in_a_process(location: Path | str, tmp_path: Path) -> None:
    entries = _entries(tmp_path / "made")
    found = folder_with(location, entries)
    for name in NAMES:
        (tmp_path / "made" / name).unlink()
    assert folder_with(location, entries) == found


def test_a_flipped_bit_is_seen(location: Path | str, tmp_path: Path) -> None:
    entries = _entries(tmp_path / "made")
    path = tmp_path / "made" / NAMES[1]
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=rf"{re.escape(NAMES[1])}: not the file that the manifest lists; found 28 b"):
        folder_with(location, entries)


def test_a_file_that_is_gone_is_named(location: Path | str, tmp_path: Path) -> None:
    entries = _entries(tmp_path / "made")
    (tmp_path / "made" / NAMES[0]).unlink()
    with pytest.raises(InputError, match=rf"{re.escape(NAMES[0])}: the file is missing"):
        folder_with(location, entries)


def test_what_is_not_small_is_not_fetched(location: Path | str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fetched, "MAX_SMALL_BYTES", 30)
    with pytest.raises(InputError, match="larger than"):
        folder_with(location, _entries(tmp_path / "made"))


class _Together(str):
    """A URL at which two threads wait for each other when the place of its files is looked up."""

    barrier = threading.Barrier(2)

    def __contains__(self, part: str) -> bool:
        self.barrier.wait(60)
        return super().__contains__(part)


def test_two_locations_at_once_have_a_folder_each(tmp_path: Path, monkeypatch, serve: Callable[[Path], str]) -> None:
    monkeypatch.setenv("CAPGAP_DOWNLOADS", str(tmp_path / "downloads"))
    for name in "ab":
        (tmp_path / "made" / name).mkdir(parents=True)
        (tmp_path / "made" / name / "config.json").write_text(f"of {name}")
    url = serve(tmp_path / "made")
    entries = [
        FileEntry(path="config.json", num_bytes=4, sha256=sha256_of(tmp_path / "made" / name / "config.json"))
        for name in "ab"
    ]
    with ThreadPoolExecutor(2) as threads:
        urls = [_Together(f"{url}/{name}") for name in "ab"]
        found = list(threads.map(lambda at, entry: folder_with(at, [entry]), urls, entries))
    assert [(folder / "config.json").read_text() for folder in found] == ["of a", "of b"]


def test_a_copy_that_the_local_disk_has_damaged_is_fetched_again(
    tmp_path: Path, monkeypatch, serve: Callable[[Path], str]
) -> None:
    monkeypatch.setenv("CAPGAP_DOWNLOADS", str(tmp_path / "downloads"))
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text("sound")
    entry = FileEntry(path="config.json", num_bytes=5, sha256=sha256_of(tmp_path / "made" / "config.json"))
    url = serve(tmp_path / "made")
    folder_with(url, [entry])
    copy = tmp_path / "downloads" / entry.sha256
    copy.write_text("wrong")
    # the same folder under another name, as another process would ask for it
    assert (folder_with(f"{url}/", [entry]) / "config.json").read_text() == "sound"
    assert copy.read_text() == "sound"
