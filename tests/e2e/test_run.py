"""`capgap run` on real input: what a second, a forced, a changed and a killed run do."""

import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from command import TINY, capgap, capgap_until, run_of

STAGES = [
    "corpus",
    "teacher",
    "cache",
    "student/seed-0",
    "train/distilled/seed-0",
    "train/cross_entropy/seed-0",
    "eval",
    "report",
]


def manifests(out: Path) -> dict[str, dict[str, object]]:
    found = {}
    for path in out.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        found[manifest["instance"]] = manifest
    return found


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def stale(out: Path, *flags: str) -> dict[str, str]:
    """Stages that `capgap status` does not call current, and its lines about them."""
    status = capgap("status", TINY, "--out", out, *flags)
    assert status.returncode == 0, status.stderr
    lines = {line.split()[0]: line for line in status.stdout.splitlines()[1:] if line.strip()}
    assert list(lines) == STAGES
    return {name: line for name, line in lines.items() if line.split()[1] != "current"}


def test_every_stage_leaves_a_manifest_and_the_table_names_every_model(finished: Path) -> None:
    assert set(manifests(finished)) == set(STAGES)
    table = (finished / "report" / "table.txt").read_text()
    for name in ("teacher", "distilled", "cross_entropy", "bytes per token"):
        assert name in table
    assert "<svg" in (finished / "report" / "report.html").read_text()


def test_a_second_run_does_nothing_and_says_so(copy: Path) -> None:
    before = manifests(copy)
    again = capgap(*run_of(copy))
    assert again.returncode == 0
    assert f"nothing to do: {len(STAGES)} of {len(STAGES)} stages are current" in again.stdout
    assert again.stdout.splitlines()[-1].startswith("look next: ")
    assert manifests(copy) == before


@pytest.mark.slow  # the project's own check does so in its second use
def test_only_train_forced_makes_the_train_stage_again_and_nothing_else(copy: Path) -> None:
    before = manifests(copy)
    forced = capgap(*run_of(copy, "--only", "train", "--force"))
    assert forced.returncode == 0, forced.stderr
    assert "made 2 of 2 stages" in forced.stdout
    after = manifests(copy)
    assert {name for name in STAGES if after[name] != before[name]} == {s for s in STAGES if s.startswith("train/")}
    # the same weights came out, so nothing downstream is stale
    assert stale(copy) == {}


@pytest.mark.slow  # both arms, and one by its name with other settings, are made again above and below
def test_one_arm_alone_can_be_made_again(copy: Path) -> None:
    before = manifests(copy)
    assert capgap(*run_of(copy, "--only", "train/distilled", "--force")).returncode == 0
    after = manifests(copy)
    assert [name for name in STAGES if after[name] != before[name]] == ["train/distilled/seed-0"]


def test_a_changed_learning_rate_makes_train_and_what_follows_stale_and_nothing_else(finished: Path) -> None:
    changed = stale(finished, "--train.learning_rate", "1e-4")
    assert list(changed) == ["train/distilled/seed-0", "train/cross_entropy/seed-0", "eval", "report"]
    assert "train.learning_rate was 0.003, is 0.0001" in changed["train/distilled/seed-0"]


def test_a_forgotten_flag_replaces_nothing_that_cost_device_time(copy: Path) -> None:
    before = manifests(copy)
    refused = capgap(*run_of(copy, "--cache.num_samples", "12"))
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert "cache (cache.num_samples was 50, is 12)" in refused.stderr
    assert "--remake cache --remake train" in refused.stderr
    # the stage's own command replaces it no more than the run does
    alone = capgap("cache", TINY, "--out", copy, "--cache.num_samples", "12")
    assert alone.returncode == 2 and "--remake cache" in alone.stderr
    assert manifests(copy) == before and stale(copy) == {}


def test_what_is_named_is_made_again_with_what_follows_from_it(copy: Path) -> None:
    flags = ("--arms", "{distilled: {alpha: 0.5, max_tokens: 4000}, cross_entropy: {alpha: 0.0}}")
    before = manifests(copy)
    done = capgap(*run_of(copy, "--remake", "train/distilled", *flags))
    assert done.returncode == 0, done.stderr
    after = manifests(copy)
    assert [n for n in STAGES if after[n] != before[n]] == ["train/distilled/seed-0", "eval", "report"]
    # a look at the run is one at what was started last
    seen = capgap("status", TINY, "--out", copy)
    assert seen.returncode == 0 and "stale" not in seen.stdout


def test_an_operational_setting_makes_nothing_stale(finished: Path) -> None:
    assert stale(finished, "--cache.batch_tokens", "4096", "--train.checkpoint_every_steps", "7") == {}


def test_a_lost_shard_makes_its_stage_stale_and_is_named(copy: Path) -> None:
    (copy / "cache" / "sampled-000000.tar").unlink()
    assert "sampled-000000.tar is gone" in stale(copy)["cache"]


def test_verify_finds_the_finished_run_sound_and_a_flipped_byte_by_name(copy: Path) -> None:
    sound = capgap("verify", copy)
    assert sound.returncode == 0, sound.stderr
    assert sound.stdout.count(": sound") == len(STAGES)
    shard = copy / "cache" / "sampled-000001.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    broken = capgap("verify", copy)
    assert broken.returncode == 4
    assert str(shard) in broken.stderr


def test_a_run_may_reuse_the_cache_of_another(finished: Path, tmp_path: Path) -> None:
    reuse = [f"--reuse.{stage}={finished / stage}" for stage in ("corpus", "teacher", "cache")]
    other = capgap("student", TINY, "--out", tmp_path / "other", *reuse)
    assert other.returncode == 0, other.stderr
    trained = capgap("train", TINY, "--out", tmp_path / "other", *reuse, "--instance", "train/distilled/seed-0")
    assert trained.returncode == 0, trained.stderr
    assert not (tmp_path / "other" / "cache").exists()
    mine = json.loads((tmp_path / "other/train/distilled/seed-0/manifest.json").read_text())
    assert mine["content"] == manifests(finished)["train/distilled/seed-0"]["content"]


@pytest.mark.slow  # tests/faults kills the stages one by one, a hundred times
def test_a_run_killed_in_every_stage_ends_with_the_digests_of_an_undisturbed_one(
    finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    chance = random.Random(0)
    for stage in STAGES:
        folder = out / stage
        began: list[float] = []

        def at_work(folder: Path = folder, began: list[float] = began, pause_s: float = chance.uniform(0, 4)) -> bool:
            if (folder / "work.json").exists():
                began.append(time.monotonic())
            return bool(began) and time.monotonic() - began[0] > pause_s

        ended = capgap_until(at_work, *run_of(out))
        assert ended in (0, -9)
    done = capgap(*run_of(out))
    assert done.returncode == 0, done.stdout + done.stderr
    undisturbed, killed = manifests(finished), manifests(out)
    for name in STAGES[:-1]:
        assert killed[name]["content"] == undisturbed[name]["content"], name
    assert killed["cache"]["shard_sets"] == undisturbed["cache"]["shard_sets"]


def test_a_stage_dies_with_its_driver(tmp_path: Path) -> None:
    work = tmp_path / "run" / "corpus" / "work.json"
    capgap_until(work.exists, *run_of(tmp_path / "run"))
    deadline = time.monotonic() + 1800
    while _processes_naming(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _processes_naming(str(tmp_path)) == []


def _processes_naming(text: str) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if text in line and str(os.getpid()) not in line and "capgap" in line]
