"""Several plain processes on one folder; some of them are killed."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from capgap.jobs.cli import main
from capgap.pipeline.cache.shards import ShardScorer
from capgap.pipeline.cache.stage import prepare
from capgap.pipeline.stage.context import Instance, Slice
from capgap.pipeline.stage.folder import LOCK_NAME, locked_folder
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store.files import TEMP_MARK
from capgap.pipeline.store.locks import ProcessLock
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.slices import carry_out_slice
from capgap.schemas.errors import CapgapError, MachineError, MismatchError
from capgap.schemas.run_file import RunFile

CACHE = Instance("cache")
DEADLINE_S = 1800


def _cache(run: RunFile) -> Path:
    return Path(run.out) / "cache"


def _shards(run: RunFile) -> list[str]:
    return sorted(path.stem for path in (_cache(run) / "work" / "scored").glob("*.json"))


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


def test_three_slices_at_once_make_the_cache_that_one_process_makes(run, start, whole) -> None:
    tiny = run()
    processes = [start(tiny, "--no-wait", "--slice", f"{i}/3") for i in range(3)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert read_manifest(_cache(tiny)).content == whole
    # whoever is not the last says how far they are, or finds the manifest
    last = [error for error in errors if "shards finished; other slices" not in error and "is current" not in error]
    assert len(last) == 1, errors
    assert sorted(path.name for path in _cache(tiny).iterdir() if "work" in path.name) == ["work.json"]
    assert carry_out(tiny, CACHE).content == whole


def test_what_a_killed_process_had_claimed_is_made_by_another(run, start, whole) -> None:
    tiny = run()
    killed, other = start(tiny, "--slice", "any"), start(tiny, "--slice", "any")
    _until(lambda: len(_shards(tiny)) >= 3 or killed.poll() is not None)
    killed.kill()
    error = other.communicate()[1]
    assert other.returncode == 0, error
    # all of it where the other had not ended before; else its message says that something is left
    if not (_cache(tiny) / "manifest.json").exists():
        assert "shards finished; other slices" in error
        assert carry_out_slice(tiny, CACHE, Slice(None)) is not None
    assert read_manifest(_cache(tiny)).content == whole


def test_a_shard_that_another_process_is_at_is_left_to_it(run, whole, caplog) -> None:
    tiny = run()
    assert carry_out_slice(tiny, CACHE, Slice(0, 10)) is None
    with ProcessLock(_cache(tiny) / "work" / "claims-scored" / "000003.lock") as lock:
        assert lock.exclusive()
        with caplog.at_level(logging.INFO):
            assert carry_out_slice(tiny, CACHE, Slice(None)) is None
    assert "cache: 19 of 20 shards finished; other slices have the rest to do" in caplog.messages
    assert "000003" not in _shards(tiny)
    manifest = carry_out_slice(tiny, CACHE, Slice(None))
    assert manifest.content == whole == read_manifest(_cache(tiny)).content


def test_a_slice_makes_its_own_shards_counted_from_0(run) -> None:
    tiny = run()
    assert carry_out_slice(tiny, CACHE, Slice.parse("1/8")) is None
    assert _shards(tiny) == ["000001", "000009", "000017"]


@pytest.mark.parametrize("text", ["8/8", "-1/8", "1", "0/0", "all", "1/8/2"])
def test_a_slice_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(CapgapError, match=r"no such slice; found .* expected i/n with i from 0 to n - 1, or any"):
        Slice.parse(text)


def test_what_a_kill_left_half_written_and_a_damaged_shard_do_not_reach_the_manifest(run, whole) -> None:
    tiny = run()
    assert carry_out_slice(tiny, CACHE, Slice(0, 2)) is None
    # another slice is at work: what lies there may be its own
    half = _cache(tiny) / f"sampled-000003.tar{TEMP_MARK}0123456789ab"
    half.write_bytes(b"half")
    shard = _cache(tiny) / "sampled-000002.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with ProcessLock(_cache(tiny) / LOCK_NAME) as other:
        assert other.shared()
        manifest = carry_out_slice(tiny, CACHE, Slice(1, 2))
    assert manifest.content == whole
    assert not half.exists()


def test_of_those_that_end_at_the_same_moment_one_writes_the_manifest(run, context_of, whole, caplog) -> None:
    tiny = run()
    assert carry_out_slice(tiny, CACHE, Slice(0, 10)) is None
    scorer = ShardScorer(prepare(context_of(tiny)))
    for index in range(20):
        scorer.make(index)
    found = []
    threads = [threading.Thread(target=lambda: found.append(carry_out_slice(tiny, CACHE, Slice(0, 10)))) for _ in "abc"]
    with caplog.at_level(logging.INFO):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert caplog.messages.count("cache is current: nothing to do") == 2
    assert [m.content for m in found] == [whole] * 3
    assert len({m.seal for m in found}) == 1


def test_an_ordinary_run_and_slices_shut_one_another_out(run) -> None:
    tiny = run()
    carry_out_slice(tiny, CACHE, Slice(0, 10))
    with ProcessLock(_cache(tiny) / LOCK_NAME) as slice_at_work:
        assert slice_at_work.shared()
        with pytest.raises(MachineError, match="another process is at work on this folder"):
            carry_out(tiny, CACHE)
    with (
        locked_folder(_cache(tiny)),
        pytest.raises(MachineError, match="another process is at work on this folder"),
    ):
        carry_out_slice(tiny, CACHE, Slice(0, 10))
    assert carry_out(tiny, CACHE).totals["num_tokens"] > 0


def test_other_settings_are_refused_while_slices_work_and_where_the_cache_is_finished(run) -> None:
    carry_out_slice(run(), CACHE, Slice(0, 10))
    with ProcessLock(_cache(run()) / LOCK_NAME) as slice_at_work:
        assert slice_at_work.shared()
        with pytest.raises(MismatchError, match=r"other slices are at work under other settings .*; found cache.seed"):
            carry_out_slice(run(seed=1), CACHE, Slice(1, 10))
    with pytest.raises(MismatchError, match="unfinished and was begun under other settings"):
        carry_out_slice(run(seed=1), CACHE, Slice(1, 10))
    finished = carry_out(run(), CACHE)
    with ProcessLock(_cache(run()) / LOCK_NAME) as slice_at_work:
        assert slice_at_work.shared()
        with pytest.raises(MachineError, match="another process is at work on this folder"):
            carry_out_slice(run(seed=1), CACHE, Slice(1, 10))
    with pytest.raises(
        MismatchError, match=r"finished and would be replaced; found cache.seed was 0, is 1; .*--remake"
    ):
        carry_out_slice(run(seed=1), CACHE, Slice(1, 10))
    assert json.loads((_cache(run()) / "work.json").read_text())["settings"]["cache"]["seed"] == 0
    assert read_manifest(_cache(run())) == finished == carry_out_slice(run(), CACHE, Slice(1, 10))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--slice", "0/2", "--force"], "--force and --slice exclude each other"),
        (["--slice", "0/2", "--cache.replicas", "2"], "cache.replicas: a slice is one engine; found 2"),
        (["--slice", "2/2"], "--slice: no such slice; found 2/2"),
    ],
)
def test_flags_that_do_not_go_with_a_slice_are_refused(run, tmp_path, capsys, arguments, said) -> None:
    path = tmp_path / "run.json"
    path.write_text(run().model_dump_json())
    assert main(["cache", str(path), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (_cache(run()) / "work.json").exists()
