"""A grid of the law through the command line: what it makes, a second run, and kill -9 on the way."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import TIMEOUT_S, Zygote, is_alive

from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import LoaderSettings, SequenceLoader, ShardReader
from capgap.schemas.manifest import Manifest

SHAPE = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
SEEDS = [0, 3]
NUM_KILLS = int(os.environ.get("CAPGAP_LAW_KILLS", "20"))
SEED = int(os.environ.get("CAPGAP_SEED", random.SystemRandom().getrandbits(32)))


@pytest.fixture(scope="module")
def grid(settings: dict[str, Any]) -> dict[str, Any]:
    """A given teacher and one that is trained, one student, two seeds: six runs."""
    return {
        "name": "tiny",
        "out": "nowhere",
        "device": "cpu",
        "seeds": SEEDS,
        "corpus": {**settings["corpus"], "teacher_fraction": 0.3},
        "teachers": {"given": settings["teacher"], "small": {"model": SHAPE}},
        "teacher_training": {"batch_sequences": 4, "max_tokens": 1000, "loggers": []},
        "cache": {**settings["cache"], "num_heldout_sequences": 0},
        "students": {"s": {"model": SHAPE}},
        "train": {"batch_sequences": 4, "checkpoint_every_steps": 3, "loggers": []},
        "budgets": {"short": {"tokens": 1300}},
        "eval": settings["eval"],
    }


@pytest.fixture(scope="module")
def grid_file(grid: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grid") / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    return path


@pytest.fixture(scope="module")
def whole(zygote: Zygote, grid_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid's folder after a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "law"
    code, said = zygote.run("law", "run", grid_file, "--out", out, "--workers", "2")
    assert code == 0, said
    return out


def table(out: Path) -> list[dict[str, Any]]:
    """Rows without the time that they took."""
    rows = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "wall_s"} for row in rows]


def manifest(out: Path, stage: str) -> Manifest:
    found = read_manifest(out / stage)
    assert found is not None
    return found


def loader_of(out: Path, teacher: str, seed: int) -> SequenceLoader:
    """What a training of that seed reads from the teacher's cache."""
    shards = manifest(out, f"teachers/{teacher}/cache").shard_sets["sampled"]
    return SequenceLoader(ShardReader(out / "teachers" / teacher / "cache", shards), LoaderSettings(4, seed))


def processes_of(session: int) -> list[int]:
    """Of a session, those that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def kill_the_first_alone(pid: int) -> None:
    """kill -9 the command and not what it has started, and wait until that has gone by itself."""
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + TIMEOUT_S
    while processes_of(pid):
        assert time.monotonic() < deadline, "its workers live on"
        time.sleep(0.01)


def test_every_run_of_the_grid_is_a_row_with_its_result(whole: Path, grid: dict[str, Any]) -> None:
    rows = table(whole)
    cells = {(row["teacher"] and row["teacher"]["name"], row["alpha"], row["seed"]) for row in rows}
    assert cells == {(name, 1.0 if name else 0.0, seed) for name in (None, "given", "small") for seed in SEEDS}
    assert len(rows) == 6
    losses = {
        name: json.loads((whole / folder / "eval/results.json").read_text())["models"]
        for name, folder in (("given", "students/s/given/seed-0"), ("small", "students/s/small/seed-0"))
    }
    for row in rows:
        assert row["missing"] is None and row["tokens"] == 1280  # ten whole steps of 4 sequences of 32 targets
        if row["teacher"] is None:
            assert row["cache"] is None and "kl" not in row["metrics"]
            continue
        teacher, student = losses[row["teacher"]["name"]]
        assert row["teacher"]["loss"] == teacher["loss"]
        assert row["metrics"].keys() >= {"kl", "top1", "top5", "acceptance", "perplexity", "bits_per_byte"}
        if row["seed"] == 0:
            assert row["loss"] == student["loss"] and row["metrics"]["kl"] == student["against_teacher"]["kl"]
        kept = manifest(whole, f"teachers/{row['teacher']['name']}/cache")
        assert row["cache"]["identity"] == kept.identity
        assert row["cache"]["num_ids"] == grid["cache"]["num_samples"]
    trained = {row["teacher"]["name"]: row["teacher"]["train_tokens"] for row in rows if row["teacher"]}
    assert trained["given"] is None and 0 < trained["small"] <= 1000
    assert (whole / "law.json").is_file() and (whole / "law.html").is_file()


def test_runs_of_one_seed_begin_with_the_same_weights_and_read_the_same_text(whole: Path) -> None:
    for seed in SEEDS:
        cells = [whole / f"students/s/{teacher}/seed-{seed}" for teacher in ("given", "small", "supervised")]
        assert len({manifest(cell, f"student/seed-{seed}").content for cell in cells}) == 1
    assert manifest(whole, f"students/s/given/seed-{SEEDS[0]}/student/seed-{SEEDS[0]}").content != (
        manifest(whole, f"students/s/given/seed-{SEEDS[1]}/student/seed-{SEEDS[1]}").content
    )
    order = [
        [batch.input_ids_BL.tolist() for batch in loader_of(whole, teacher, SEEDS[1])] for teacher in ("given", "small")
    ]
    assert order[0] == order[1] and len(order[0]) > 5
    assert order[0] != [batch.input_ids_BL.tolist() for batch in loader_of(whole, "given", SEEDS[0])]


def test_a_second_run_has_nothing_to_do_and_the_table_can_be_made_again(
    zygote: Zygote, whole: Path, grid_file: Path
) -> None:
    before = (whole / "runs.jsonl").read_bytes()
    (whole / "runs.jsonl").unlink()
    code, said = zygote.run("law", "table", grid_file, "--out", whole)
    assert code == 0 and (whole / "runs.jsonl").read_bytes() == before, said
    code, said = zygote.run("law", "run", grid_file, "--out", whole)
    assert code == 0 and "nothing to do: 6 of 6 runs have their result" in said
    assert (whole / "runs.jsonl").read_bytes() == before
    code, said = zygote.run("law", "plan", grid_file, "--out", whole, "--json")
    assert code == 0, said
    plan = json.loads(said)
    assert plan["num_processes"] == 0 and plan["device_hours"]["value"] == 0
    assert {phase["phase"]: phase["num_runs"] for phase in plan["phases"]} == {
        "corpus": 1,
        "teachers": 2,
        "caches": 2,
        "students": 6,
        "measurements": 6,
    }


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (("--train.learning_rate", "0.5"), ("train.learning_rate", "train/short-supervised/seed-0", "3 more")),
        (("--teacher_training.learning_rate", "0.5"), ("teachers/small/teacher", "learning_rate")),
        (("--cache.num_samples", "7"), ("teachers/given/cache", "teachers/small/cache", "num_samples")),
        (("--corpus.seq_len", "16"), ("students/s/given/seed-0/train/", "more", "seq_len")),
    ],
)
def test_a_forgotten_setting_replaces_nothing_that_cost_device_time(
    zygote: Zygote, whole: Path, grid_file: Path, flag: tuple[str, str], words: tuple[str, ...]
) -> None:
    before = table(whole)
    code, said = zygote.run("law", "run", grid_file, "--out", whole, "--workers", "2", *flag)
    assert code == 2
    for word in ("finished stages would be replaced", "--replace", *words):
        assert word in said
    assert table(whole) == before
    code, said = zygote.run("law", "run", grid_file, "--out", whole, "--workers", "2")
    assert code == 0 and "nothing to do: 6 of 6" in said


def test_the_run_files_of_the_grid_are_ordinary_ones(zygote: Zygote, whole: Path) -> None:
    cell = whole / "students/s/small/seed-3"
    code, said = zygote.run("status", cell / "run.yaml")
    assert code == 0
    states = {line.split()[0]: line.split()[1] for line in said.splitlines()[1:]}
    assert states["train/short-alpha-1/seed-3"] == "current" and states["eval"] == "current"
    assert states["cache"] == "reused"


@pytest.mark.slow
def test_killed_on_the_way_a_grid_goes_on_and_ends_in_the_same_table(
    zygote: Zygote, whole: Path, grid_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "law"
    pid = zygote.start("law", "run", grid_file, "--out", out, "--workers", "2")
    while is_alive(pid) and not list(out.glob("students/*/*/*/eval/manifest.json")):
        time.sleep(0.01)
    kill_the_first_alone(pid)
    code, said = zygote.end()
    assert code == -signal.SIGKILL, said
    finished = list(out.glob("students/*/*/*/eval/manifest.json"))
    stamps = {path: path.stat().st_mtime_ns for path in finished}
    code, said = zygote.run("law", "table", grid_file, "--out", out)
    assert code == 0, said
    left = {row["missing"] for row in table(out) if row["missing"]}
    assert left and all(why.startswith(("not made", "not trained", "trained, not measured")) for why in left)
    code, said = zygote.run("law", "run", grid_file, "--out", out, "--workers", "2")
    assert code == 0, said
    assert table(out) == table(whole)
    assert {path: path.stat().st_mtime_ns for path in finished} == stamps, "what was finished is made again"


def test_interrupted_a_grid_ends_with_all_its_processes_and_keeps_its_table(
    zygote: Zygote, whole: Path, grid_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "law"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "students")
    pid = zygote.start("law", "run", grid_file, "--out", out, "--workers", "2")
    while is_alive(pid) and not list(out.glob("students/*/*/*/log.txt")):
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    code, said = zygote.end()
    assert code == 130 and "interrupted; the same command goes on from here" in said
    assert processes_of(pid) == []
    assert len(table(out)) == 6


def test_a_run_that_fails_is_named_and_the_others_go_on(
    zygote: Zygote, whole: Path, grid: dict[str, Any], tmp_path: Path
) -> None:
    """A student of a learning rate that no training survives, beside one of a sound one."""
    sound, wild = {"model": SHAPE}, {"model": {**SHAPE, "intermediate_size": 16}}
    values = {
        **grid,
        "seeds": [0],
        "students": {"sound": sound, "wild": wild},
        "train_of": {"wild": {"learning_rate": 1e30, "warmup_fraction": 0}},
        "teachers": {"given": grid["teachers"]["given"]},
        "reuse": {"corpus": str(whole / "corpus"), "caches": {"given": str(whole / "teachers/given/cache")}},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(values))
    out = tmp_path / "law"
    code, said = zygote.run("law", "run", path, "--out", out, "--workers", "1")
    assert code == 5, said
    assert not (out / "corpus").exists() and not (out / "teachers/given/cache").exists()
    rows = {(row["student"]["name"], row["alpha"]): row for row in table(out)}
    assert rows["sound", 1.0]["loss"] > 0 and rows["sound", 0.0]["loss"] > 0
    for alpha in (0.0, 1.0):
        assert rows["wild", alpha]["loss"] is None
        assert rows["wild", alpha]["missing"].startswith("train/short-"), rows["wild", alpha]["missing"]
        assert rows["wild", alpha]["missing"] in said


def test_a_reused_cache_of_another_recording_is_refused_before_anything_is_trained(
    zygote: Zygote, whole: Path, grid: dict[str, Any], tmp_path: Path
) -> None:
    values = {
        **grid,
        "cache": {**grid["cache"], "num_samples": 10},
        "reuse": {"corpus": str(whole / "corpus"), "caches": {"given": str(whole / "teachers/given/cache")}},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(values))
    code, said = zygote.run("law", "run", path, "--out", tmp_path / "law")
    assert code == 2
    assert (
        "caches of different recordings in one grid; found sampled of 20, temperature 1, expected sampled of 10" in said
    )
    assert not (tmp_path / "law/teachers").exists()


@pytest.mark.slow
def test_killed_at_random_instants_a_grid_ends_in_the_table_of_an_undisturbed_one(
    zygote: Zygote, whole: Path, grid_file: Path, tmp_path: Path
) -> None:
    chance = random.Random(f"{SEED} law")
    begun = time.monotonic()
    code, said = zygote.run("law", "run", grid_file, "--out", tmp_path / "first", "--workers", "2")
    whole_s = time.monotonic() - begun
    assert code == 0, said
    num_kills = num_grids = 0
    while num_kills < NUM_KILLS:
        out, instants = tmp_path / f"law-{num_grids}", []
        code = -9
        while code == -9 and len(instants) < 4:
            instants.append(round(chance.uniform(0, whole_s), 3))
            code, said = zygote.run("law", "run", grid_file, "--out", out, kill_after_s=instants[-1])
            num_kills += code == -9
        if code == -9:
            code, said = zygote.run("law", "run", grid_file, "--out", out, "--workers", "2")
        why = f"CAPGAP_SEED={SEED}, grid {num_grids}, killed after {instants} s"
        assert code == 0, f"{why}: {said}"
        assert table(out) == table(whole), why
        num_grids += 1
    print(f"law: {num_kills} kills in {num_grids} grids, {whole_s:.2f} s undisturbed, seed {SEED}")
