from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.stage.folder import WORK_FOLDER, begin, plan_units
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.manifest import MANIFEST_NAME
from capgap.schemas.run_file import RunFile


def test_a_run_that_was_never_made_is_missing_throughout(make_run) -> None:
    assert {(state.state, state.why) for state in states(make_run()).values()} == {(State.MISSING, "never made")}


def _states(run: RunFile) -> dict[str, str]:
    return {name: f"{s.state}: {s.why}" if s.why else str(s.state) for name, s in states(run).items()}


@pytest.fixture
def finished_run(make_run, make_finished) -> RunFile:
    run = make_run()
    for name in states(run):
        make_finished(run, name)
    return run


def test_a_run_that_was_made_is_current_throughout(finished_run) -> None:
    assert set(_states(finished_run).values()) == {"current"}


def test_a_changed_setting_makes_its_stage_stale_and_names_it(finished_run, make_run) -> None:
    found = _states(make_run({"cache.num_samples": 64}))
    assert found["cache"] == "stale: cache.num_samples was 50, is 64"
    assert found["train/distilled/seed-1"] == "stale: input cache changed"
    assert {name for name, text in found.items() if text == "current"} == {"corpus", "teacher", "student/seed-0",
                                                                           "student/seed-1"}  # fmt: skip


def test_an_input_that_came_out_different_makes_what_reads_it_stale(finished_run, make_finished) -> None:
    make_finished(finished_run, "cache", "another result of the same settings")
    found = _states(finished_run)
    assert found["cache"] == "current"
    assert found["train/distilled/seed-0"] == "stale: input cache was made again and came out different"
    assert found["eval"] == "stale: input cache was made again and came out different"


def test_an_input_that_came_out_the_same_makes_nothing_stale(finished_run, make_finished) -> None:
    make_finished(finished_run, "cache")
    assert set(_states(finished_run).values()) == {"current"}


@pytest.mark.parametrize(
    ("damage", "why"),
    [(lambda path: path.unlink(), "result.txt is gone"), (lambda path: path.write_text("12"), "has 2 bytes, not 6")],
)
def test_a_folder_that_lost_a_file_is_stale(finished_run, tmp_path: Path, damage, why: str) -> None:
    damage(tmp_path / "out" / "teacher" / "result.txt")
    found = _states(finished_run)
    assert found["teacher"].startswith("stale: ") and why in found["teacher"]
    assert found["cache"] == "stale: input teacher is stale"
    assert found["student/seed-0"] == "current"


def test_a_begun_folder_is_partial_and_says_how_far_it_got(make_run) -> None:
    run = make_run()
    cache = states(run)["cache"]
    (cache.folder / WORK_FOLDER / "scored").mkdir(parents=True)
    begin(cache.folder, cache.order)
    assert _states(run)["cache"] == "partial: begun"
    plan_units(cache.folder / WORK_FOLDER, "shards", 4, "scored/*.json")
    (cache.folder / WORK_FOLDER / "scored" / "000000.json").touch()
    assert _states(run)["cache"] == "partial: 1 of 4 shards"
    found = _states(make_run({"cache.seed": 9}))
    assert found["cache"] == "partial: 1 of 4 shards, begun under other settings: cache.seed was 0, is 9"


@pytest.mark.parametrize("text", ["", "{", "{}", '{"format": "capgap-manifest-2"}', "\udcff"])
def test_a_manifest_that_cannot_be_understood_is_named(make_run, make_finished, tmp_path: Path, text: str) -> None:
    run = make_run()
    make_finished(run, "corpus")
    path = tmp_path / "out" / "corpus" / MANIFEST_NAME
    path.write_bytes(os.fsencode(text))
    with pytest.raises(CorruptError, match=f"{path}: the manifest cannot be understood; found .*delete this file"):
        states(run)


def test_no_manifest_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert read_manifest(tmp_path) is read_manifest(tmp_path / "no") is read_manifest(tmp_path / "file") is None


def test_a_reused_folder_takes_the_place_of_its_stage(finished_run, make_run, make_finished, tmp_path: Path) -> None:
    corpus = str(tmp_path / "out" / "corpus")
    other = make_run({"out": str(tmp_path / "second"), "reuse": {"corpus": corpus}})
    found = states(other)
    assert "corpus" not in found
    assert found["teacher"].order.identity == states(finished_run)["teacher"].order.identity
    make_finished(finished_run, "corpus", "another result")
    make_finished(other, "teacher")
    assert _states(other)["teacher"] == "current"
    make_finished(finished_run, "corpus", "a third result")
    assert _states(other)["teacher"] == "stale: input corpus was made again and came out different"


@pytest.mark.parametrize(
    ("folder", "found"), [("nowhere", "found no manifest.json"), ("out/teacher", "found a finished teacher stage")]
)
def test_only_a_finished_folder_of_that_stage_can_be_reused(
    finished_run, make_run, tmp_path: Path, folder: str, found: str
) -> None:
    run = make_run({"reuse": {"corpus": str(tmp_path / folder)}})
    with pytest.raises(
        InputError, match=rf"reuse.corpus: .*{folder}: cannot be reused; {found}, expected the folder of"
    ):
        states(run)


def test_a_further_cache_is_an_input_of_the_trainings_that_read_it(finished_run, make_run, make_finished, tmp_path):
    cache = str(tmp_path / "out" / "cache")
    further = {"arms": {"distilled": {"caches": {"code": {"path": cache, "weight": 2}}}, "cross_entropy": {"alpha": 0}}}
    run = make_run(further | {"out": str(tmp_path / "second")})
    inputs = {name: state.order.inputs for name, state in states(run).items()}
    reads = {name for name, found in inputs.items() if "caches/code" in found}
    assert reads == {"train/distilled/seed-0", "train/distilled/seed-1"}
    manifest = read_manifest(tmp_path / "out" / "cache")
    entry = inputs["train/distilled/seed-0"]["caches/code"]
    assert manifest is not None and (entry.path, entry.content) == (cache, manifest.content)


@pytest.fixture
def with_further(finished_run, make_run, make_finished, tmp_path) -> Callable[..., RunFile]:
    """A second run whose training reads the first one's cache too; all of it up to the training is finished."""

    def make(**cache: Any) -> RunFile:
        given = {"path": str(tmp_path / "out" / "cache")} | cache
        return make_run({"out": str(tmp_path / "second"), "seeds": [0], "train.caches": {"code": given}})

    run = make()
    for name in ("corpus", "teacher", "cache", "student/seed-0", "train/distilled/seed-0"):
        make_finished(run, name)
    return make


def test_a_changed_further_cache_is_named(finished_run, with_further, make_finished, tmp_path) -> None:
    name = "train/distilled/seed-0"
    assert _states(with_further())[name] == "current"
    assert _states(with_further(weight=2))[name] == "stale: train.caches.code.weight was 1.0, is 2.0"
    moved = tmp_path / "moved"
    (tmp_path / "out" / "cache").rename(moved)
    assert _states(with_further(path=str(moved)))[name] == "current", "what lies there decides"
    moved.rename(tmp_path / "out" / "cache")
    make_finished(finished_run, "cache", "another result")
    assert _states(with_further())[name] == "stale: input caches/code was made again and came out different"


def test_another_cache_in_its_place_is_named(finished_run, with_further, make_run, make_finished, tmp_path) -> None:
    other = make_run({"out": str(tmp_path / "third"), "cache.seed": 5})
    for name in ("corpus", "teacher", "cache"):
        make_finished(other, name)
    run = with_further(path=str(tmp_path / "third" / "cache"))
    assert _states(run)["train/distilled/seed-0"] == "stale: input caches/code changed"


@pytest.mark.parametrize(
    ("folder", "found"), [("nowhere", "found no manifest.json"), ("out/teacher", "found a finished teacher stage")]
)
def test_only_a_finished_cache_can_be_read_beside(finished_run, make_run, tmp_path, folder: str, found: str) -> None:
    run = make_run({"train.caches": {"code": {"path": str(tmp_path / folder)}}})
    with pytest.raises(
        InputError, match=rf"train.caches.code: .*{folder}: cannot be reused; {found}, expected the fol"
    ):
        states(run)
