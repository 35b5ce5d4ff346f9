from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from capgap.pipeline.store import DiskCache
from capgap.pipeline.store.locks import held_alone
from capgap.schemas.errors import CorruptError, InputError, SettingError
from capgap.schemas.manifest import FileEntry


def _file(number: int, size: int = 1000) -> tuple[FileEntry, bytes]:
    data = random.Random(number).randbytes(size)
    return FileEntry(path=f"{number}.tar", num_bytes=size, sha256=hashlib.sha256(data).hexdigest()), data


class _Source:
    def __init__(self, *answers: bytes) -> None:
        self.answers, self.num_asked = list(answers), 0

    def __call__(self) -> Iterable[bytes]:
        self.num_asked += 1
        data = self.answers[min(self.num_asked, len(self.answers)) - 1]
        return (data[i : i + 300] for i in range(0, len(data), 300))


def _copies(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_a_file_is_fetched_once(tmp_path) -> None:
    cache, (entry, data) = DiskCache(tmp_path, 10_000), _file(0)
    source = _Source(data)
    for _ in range(3):
        with cache.open(entry, source, "here") as file:
            assert file.read() == data
    assert source.num_asked == 1
    assert _copies(tmp_path) == {entry.sha256}


def test_the_files_used_longest_ago_make_room_and_open_ones_stay_readable(tmp_path) -> None:
    cache = DiskCache(tmp_path, 3_500)
    files = [_file(number) for number in range(5)]
    opened = [cache.open(entry, _Source(data), "here") for entry, data in files[:3]]
    cache.open(files[0][0], _Source(), "here").close()  # used again
    for entry, data in files[3:]:
        cache.open(entry, _Source(data), "here").close()
    assert _copies(tmp_path) == {files[number][0].sha256 for number in (0, 3, 4)}
    assert [file.read() for file in opened] == [data for _, data in files[:3]]
    for file in opened:
        file.close()


def test_a_broken_connection_is_tried_again(tmp_path) -> None:
    entry, data = _file(0)
    source = _Source(data[:700], data)
    with DiskCache(tmp_path, 10_000).open(entry, source, "here") as file:
        assert file.read() == data
    assert source.num_asked == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"x" + data[1:]])
def test_a_file_that_arrives_otherwise_than_listed_is_refused_and_not_kept(
    tmp_path, damage: Callable[[bytes], bytes]
) -> None:
    entry, data = _file(0)
    with pytest.raises(CorruptError, match=r"^s3://b/0\.tar: not the file that the manifest lists; found .* bytes"):
        DiskCache(tmp_path, 10_000).open(entry, _Source(damage(data)), "s3://b/0.tar")
    assert _copies(tmp_path) == set()


def test_of_copies_only_a_damaged_one_is_dropped(tmp_path) -> None:
    cache, (entry, data), (other, _) = DiskCache(tmp_path, 10_000), _file(0), _file(1)
    source = _Source(data)
    cache.open(entry, source, "here").close()
    for sound in (entry, other):
        cache.drop_damaged(sound)
    assert _copies(tmp_path) == {entry.sha256}
    (tmp_path / entry.sha256).write_bytes(b"x" + data[1:])
    cache.drop_damaged(entry)
    assert _copies(tmp_path) == set()
    with cache.open(entry, source, "here") as file:
        assert file.read() == data
    assert source.num_asked == 2


def test_a_file_larger_than_the_cache_is_refused(tmp_path) -> None:
    entry, data = _file(0)
    with pytest.raises(InputError, match=r"found 1,000 bytes, expected at most 999; set CAPGAP_DOWNLOADS_GB"):
        DiskCache(tmp_path, 999).open(entry, _Source(data), "here")


def test_what_a_killed_download_left_is_room(tmp_path) -> None:
    cache = DiskCache(tmp_path, 1_500)
    (other, _), (entry, data) = _file(1), _file(0)
    for digest in (other.sha256, entry.sha256):
        (tmp_path / f"{digest}.partial").write_bytes(b"half" * 200)
    with cache.open(entry, _Source(data), "here") as file:
        assert file.read() == data
    assert _copies(tmp_path) == {entry.sha256}


def test_an_error_of_the_source_reaches_the_caller_and_leaves_nothing(tmp_path) -> None:
    entry, _ = _file(0)

    def broken() -> Iterable[bytes]:
        yield b"some"
        raise InputError("cannot be read", where="there")

    with pytest.raises(InputError, match="there: cannot be read"):
        DiskCache(tmp_path, 10_000).open(entry, broken, "here")
    assert _copies(tmp_path) == set()


def test_threads_share_one_download_and_the_bound_holds_all_the_time(tmp_path) -> None:
    files, wrong, most = [_file(number) for number in range(12)], [], [0]
    cache, done = DiskCache(tmp_path, 4_000), threading.Event()

    def watch() -> None:
        while not done.is_set():
            sizes = 0
            for path in tmp_path.iterdir():
                try:
                    sizes += path.stat().st_size if path.is_file() else 0
                except FileNotFoundError:
                    continue
            most[0] = max(most[0], sizes)

    def work(seed: int) -> None:
        for entry, data in random.Random(seed).choices(files, k=40):
            with cache.open(entry, _Source(data), "here") as file:
                if file.read() != data:
                    wrong.append(entry.path)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        done.set()
        watcher.join()
    assert wrong == []
    # a listing is no snapshot: while it runs, one file may be deleted and the next begun
    assert most[0] <= 5_000


WORKER = """
import hashlib, random, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from capgap.pipeline.store import DiskCache
from capgap.schemas.manifest import FileEntry
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
cache = DiskCache(folder / "copies", 5_000)
order = random.Random(seed)
for number in [order.randrange(10) for _ in range(60)]:
    data = random.Random(number).randbytes(1000)
    def download():
        with (folder / "asked").open("a") as asked:
            asked.write(f"{number}\\n")
        yield data
    entry = FileEntry(path=str(number), num_bytes=1000, sha256=hashlib.sha256(data).hexdigest())
    with cache.open(entry, download, "here") as file:
        assert file.read() == data
"""


def test_processes_share_a_folder(tmp_path) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(n)]) for n in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    copies = _copies(tmp_path / "copies")
    assert len(copies) == 5 and not any(name.endswith(".partial") for name in copies)


SLOW = """
import hashlib, random, sys, time
from pathlib import Path
from capgap.pipeline.store import DiskCache
from capgap.schemas.manifest import FileEntry
folder, most, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
(folder / f"ready-{seed}").touch()
while len(list(folder.glob("ready-*"))) < 3:
    time.sleep(0.01)
order = random.Random(seed)
for number in [20 + seed, *(order.randrange(12) for _ in range(30))]:
    data = random.Random(number).randbytes(1000)
    def download():
        for start in range(0, 1000, 100):
            while number >= 20 and start == 500 and not (folder / "seen").exists():
                time.sleep(0.01)  # until the test has seen the first three at once
            yield data[start : start + 100]
    entry = FileEntry(path=str(number), num_bytes=1000, sha256=hashlib.sha256(data).hexdigest())
    with DiskCache(folder / "copies", most).open(entry, download, "here") as file:
        assert file.read() == data
"""


@pytest.mark.parametrize(
    ("most", "bound"),
    [
        pytest.param(4_000, 4_000, id="never above the bound"),
        pytest.param(1_500, 3_000, id="three downloads at once are larger than it: never above them"),
    ],
)
def test_processes_that_download_at_once_stay_within_the_bound(tmp_path, most: int, bound: int) -> None:
    DiskCache(tmp_path / "copies", most)
    workers = [subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path), str(most), str(n)]) for n in range(3)]
    seen = []
    while any(worker.poll() is None for worker in workers):
        # under this lock files come and go, so a listing is a snapshot
        with held_alone(tmp_path / "copies" / "locks" / "room"):
            sizes = {p.name: p.stat().st_size for p in (tmp_path / "copies").iterdir() if p.is_file()}
        seen.append(sum(sizes.values()))
        num_partial = sum(name.endswith(".partial") for name in sizes)
        if num_partial == 3:
            (tmp_path / "seen").touch()
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert (tmp_path / "seen").exists(), "downloads at once were seen"
    assert 0 < max(seen) <= bound


@pytest.mark.parametrize("size", ["", "much", "0", "-1", "nan", "inf"])
def test_a_size_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path, size: str) -> None:
    monkeypatch.setenv("CAPGAP_DOWNLOADS", str(tmp_path))
    monkeypatch.setenv("CAPGAP_DOWNLOADS_GB", size)
    with pytest.raises(SettingError, match="CAPGAP_DOWNLOADS_GB: not a size"):
        DiskCache.default()
