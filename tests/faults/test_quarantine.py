"""A damaged shard, from `capgap verify --quarantine` to a cache that is whole again, or a training without it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from processes import Zygote, one_line

SHARD = "sampled-000003.tar"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def content_of(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["content"]


def test_only_damaged_shards_are_scored_again_and_the_cache_is_the_one_it_was(
    zygote: Zygote, copy: Path, made: Path, run_file: Path
) -> None:
    cache = copy / "cache"
    flip(cache / SHARD)
    code, said = zygote.run("verify", "--quarantine", cache)
    assert code != 0
    line = one_line(said)
    assert "damaged files are in quarantine" in line and str(cache / SHARD) in line
    assert list(json.loads((cache / "quarantine.json").read_text())) == [SHARD]
    code, said = zygote.run("status", run_file, "--out", copy)
    assert f"{SHARD} is in quarantine" in said
    kept = {path.name: path.stat().st_ino for path in cache.glob("*.tar")}

    code, said = zygote.run("cache", run_file, "--out", copy)

    assert code == 0, said
    changed = [path.name for path in cache.glob("*.tar") if path.stat().st_ino != kept[path.name]]
    assert changed == [SHARD]
    assert content_of(cache) == content_of(made / "cache")
    assert not (cache / "quarantine.json").exists()
    facts = [json.loads((folder / "manifest.json").read_text())["facts"] for folder in (cache, made / "cache")]
    assert facts[0] == facts[1]
    code, said = zygote.run("verify", copy)
    assert code == 0, said


def test_a_shard_that_is_gone_is_made_again_and_no_other(zygote: Zygote, copy: Path, made: Path, run_file) -> None:
    cache = copy / "cache"
    (cache / SHARD).unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.tar")}
    code, said = zygote.run("cache", run_file, "--out", copy)
    assert code == 0, said
    assert {name: (cache / name).stat().st_mtime_ns for name in kept} == kept
    assert content_of(cache) == content_of(made / "cache")


def test_a_training_stops_at_a_quarantined_shard_by_name_unless_it_may_skip(
    zygote: Zygote, copy: Path, run_file: Path
) -> None:
    shard = copy / "cache" / SHARD
    os.truncate(shard, shard.stat().st_size // 2)
    assert zygote.run("verify", "--quarantine", copy)[0] != 0
    train = ("train", run_file, "--out", copy, "--train.learning_rate", "1e-4")

    code, said = zygote.run(*train, "--remake", "train")
    assert code != 0
    assert f"needs cache; found stale ({SHARD} is in quarantine)" in one_line(said)

    code, said = zygote.run(*train, "--train.on_corrupt", "skip", "--remake", "train")
    assert code == 0, said
    skipped = json.loads((copy / "train/distilled/seed-0/manifest.json").read_text())["totals"]["skipped_sequences"]
    assert list(skipped) == [f"{shard}, member {SHARD.removesuffix('.tar')}-0000"]
    # a fifth of all: far more than may be skipped without having been seen to
    assert sum(skipped.values()) == 8

    code, said = zygote.run(*train, "--train.on_corrupt", "skip")
    assert code == 0 and "is current" in said, said


def test_a_reused_cache_stops_and_skips_alike(zygote: Zygote, copy: Path, made: Path, run_file: Path) -> None:
    flip(copy / "cache" / SHARD)
    assert zygote.run("verify", "--quarantine", copy / "cache")[0] != 0
    train = ("train", run_file, "--out", copy, "--reuse.cache", copy / "cache", "--train.learning_rate", "1e-4")
    train += ("--remake", "train")
    train += ("--reuse.corpus", made / "corpus", "--reuse.teacher", made / "teacher")
    code, said = zygote.run(*train)
    assert code != 0
    assert f"{copy / 'cache' / SHARD}" in one_line(said) and "the shard is in quarantine" in said
    code, said = zygote.run(*train, "--train.on_corrupt", "skip")
    assert code == 0, said


def test_a_shard_that_was_put_back_leaves_the_quarantine(zygote: Zygote, copy: Path) -> None:
    shard = copy / "cache" / SHARD
    sound = shard.read_bytes()
    flip(shard)
    assert zygote.run("verify", "--quarantine", copy / "cache")[0] != 0
    shard.write_bytes(sound)
    code, said = zygote.run("verify", "--quarantine", copy / "cache")
    assert code == 0, said
    assert not (copy / "cache" / "quarantine.json").exists()
