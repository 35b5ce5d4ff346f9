"""Every kind of damage to a cache: named by `capgap verify` and by whoever reads it, and mended by the same command.

`CAPGAP_FLIPS` says how many bytes are changed, over all stages of a run; `CAPGAP_SEED` chooses others.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from processes import Zygote, one_line

from capgap.pipeline.stage.manifests import read_manifest, read_work_order
from capgap.pipeline.store import ShardReader
from capgap.pipeline.verify.verify import verify
from capgap.schemas.errors import CapgapError, CorruptError
from capgap.schemas.manifest import Manifest

NUM_FLIPS = int(os.environ.get("CAPGAP_FLIPS", "1000"))
SEED = int(os.environ.get("CAPGAP_SEED", "8"))
SHARD = "sampled-000004.tar"

# Where a byte of the first member lies, as a function of the offset and length of its data.
REGIONS = {
    "tar header, name": lambda offset, size: offset - 512,
    "tar header, size": lambda offset, size: offset - 512 + 130,
    "tar header, checksum": lambda offset, size: offset - 512 + 150,
    "zstd header": lambda offset, size: offset + 1,
    "first compressed bytes, Arrow's metadata": lambda offset, size: offset + 24,
    "compressed body": lambda offset, size: offset + size // 2,
    "zstd checksum": lambda offset, size: offset + size - 1,
    "tar padding": lambda offset, size: offset + size,
    "end of the tar": lambda offset, size: -1,
}


def flip(path: Path, place: int, mask: int = 4) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(data)


@pytest.mark.parametrize("region", REGIONS)
def test_a_flipped_bit_of_each_region_is_found_by_name(copy: Path, region: str) -> None:
    cache = copy / "cache"
    manifest = read_manifest(cache)
    assert manifest is not None
    shard_set = manifest.shard_sets["sampled"]
    number, shard = next((n, s) for n, s in enumerate(shard_set.shards) if s.file.path == SHARD)
    member = shard.member(0)
    place = REGIONS[region](member.offset, member.num_bytes)
    flip(cache / SHARD, place)
    with pytest.raises(CorruptError, match=f"{cache / SHARD}: the file is not what it was"):
        list(verify(cache))
    reader = ShardReader(cache, shard_set)
    if member.offset <= place % shard.file.num_bytes < member.offset + member.num_bytes:
        with pytest.raises(CorruptError, match=f"{cache / SHARD}, member .*: checksum mismatch"):
            reader.read_member(number, 0)
    else:
        # nothing that is read there: the reader goes by the manifest's offsets
        assert len(reader.read_member(number, 0)[0]) == member.num_sequences


@pytest.mark.parametrize("kept", [0, 100, 512, 600, -1])
def test_a_truncated_shard_is_one_line_and_made_again_by_the_same_command(
    zygote: Zygote, copy: Path, made: Path, run_file: Path, kept: int
) -> None:
    shard = copy / "cache" / SHARD
    shard.write_bytes(shard.read_bytes()[:kept])
    code, said = zygote.run("verify", copy / "cache")
    assert code != 0 and f"{shard}: the file is not what it was" in one_line(said)
    code, said = zygote.run("cache", run_file, "--out", copy)
    assert code == 0, said
    assert shard.read_bytes() == (made / "cache" / SHARD).read_bytes()


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "\0", '{"stage": "cache"}', "[" * 100_000, '{"a":' * 10_000])
def test_a_manifest_that_is_none_is_one_line(zygote: Zygote, copy: Path, run_file: Path, damage: str) -> None:
    manifest = copy / "cache" / "manifest.json"
    manifest.write_text(damage)
    for command in (("verify", copy), ("train", run_file, "--out", copy)):
        code, said = zygote.run(*command)
        assert code != 0 and f"{manifest}: the manifest cannot be understood" in one_line(said)


def test_every_flipped_byte_of_thousands_is_found_or_says_the_same(copy: Path) -> None:
    chance = random.Random(SEED)
    stages = [path.parent for path in copy.rglob("manifest.json")]
    # logs are for people, and no part of the result
    files = {
        path: stage
        for stage in stages
        for path in stage.rglob("*")
        if path.is_file() and path.stat().st_size and "logs" not in path.relative_to(stage).parts
    }
    sound = {path: path.read_bytes() for path in files}
    before = {stage: (read_manifest(stage), read_work_order(stage)) for stage in stages}
    # half over the bytes of the run, half over its files, so that small ones have their share
    by_size = chance.choices(list(sound), [len(data) for data in sound.values()], k=NUM_FLIPS // 2)
    chosen = sorted([*by_size, *chance.choices(list(sound), k=NUM_FLIPS - len(by_size))])
    found, harmless = Counter[Path](), Counter[str]()
    for path in chosen:
        data, stage = bytearray(sound[path]), files[path]
        place = chance.randrange(len(data))
        data[place] ^= chance.randrange(1, 256)
        path.write_bytes(data)
        try:
            list(verify(stage))
            # what was not found is white space, or another spelling of the same value
            same = path.name in ("manifest.json", "work.json")
            assert same and (read_manifest(stage), read_work_order(stage)) == before[stage], (path, place, SEED)
            harmless[path.name] += 1
        except CapgapError as error:
            assert str(path) in str(error), (path, place, SEED, error)
            found[path] += 1
        finally:
            path.write_bytes(sound[path])
    assert found.total() + harmless.total() == NUM_FLIPS
    assert found.keys() >= {path for path in sound if path.parent.name == "cache"}
    assert all(list(verify(stage)) for stage in stages)
    print(
        f"{found.total()} of {NUM_FLIPS} flips found, {harmless.total()} change nothing: {dict(harmless)}, seed {SEED}"
    )


def test_a_manifest_whose_numbers_no_program_can_hold_is_refused(copy: Path) -> None:
    cache = copy / "cache"
    whole = json.loads((cache / "manifest.json").read_text())
    for number in ("NaN", "-Infinity", "1" * 5000, "1e400"):
        text = json.dumps(whole | {"totals": {"num_tokens": 0}}).replace('"num_tokens": 0', f'"num_tokens": {number}')
        (cache / "manifest.json").write_text(text)
        with pytest.raises(CorruptError, match=r"manifest\.json"):
            list(verify(cache))
    Manifest.model_validate(whole)
