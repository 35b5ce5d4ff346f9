"""`verify --quarantine`, then the cache stage, then `verify`: sound, whatever was damaged and whatever sidecars say."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.cache.reopen import reopen
from capgap.pipeline.cache.shards import FinishedShard, ShardScorer
from capgap.pipeline.cache.stage import prepare
from capgap.pipeline.stage.context import Instance, StageContext
from capgap.pipeline.stage.folder import content_files, finish
from capgap.pipeline.stage.identity import content_of
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store.ranking import RANKING_NAME
from capgap.pipeline.verify.verify import verify
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import CorruptError
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

CACHE = Instance("cache")
BOTH = {"recording": "both", "top_k": 12, "num_heldout_sequences": 8, "max_tokens": 700}
DAMAGED = ["sampled-000001.tar", "topk-000000.tar", "heldout-sampled-000000.tar"]
NUM_MUTATIONS = int(os.environ.get("CAPGAP_MUTATIONS", "4000"))
SEED = int(os.environ.get("CAPGAP_SEED", "17"))


@pytest.fixture
def tiny(run) -> RunFile:
    return run(**BOTH)


def _cache(tiny: RunFile) -> Path:
    return Path(tiny.out) / "cache"


def _damage_before_the_digest(folder: Path, name: str) -> None:
    """As if a shard's bytes had been damaged on their way to the disk: every digest is of the damaged bytes."""
    manifest = read_manifest(folder)
    assert manifest is not None
    before = (folder / name).read_bytes()
    (shard,) = [s for each in manifest.shard_sets.values() for s in each.shards if s.file.path == name]
    data = bytearray(before)
    data[shard.member(0).offset + shard.member(0).num_bytes // 2] ^= 1
    (folder / name).write_bytes(data)
    files = content_files(folder)
    digests = {file.path: file.sha256 for file in files}
    text = manifest.model_dump_json().replace(shard.file.sha256, digests[name])
    finish(folder, Manifest.model_validate_json(text).model_copy(update={"content": content_of(files)}))


def _repair(tiny: RunFile) -> Manifest:
    """The three commands; the last one must find the folder sound."""
    with pytest.raises(CorruptError, match="are in quarantine"):
        list(verify(_cache(tiny), quarantine=True))
    manifest = carry_out(tiny, CACHE)
    assert list(verify(_cache(tiny), quarantine=True)) == list(verify(_cache(tiny)))
    assert not (_cache(tiny) / "quarantine.json").exists()
    return manifest


@pytest.mark.parametrize("name", DAMAGED)
def test_a_shard_whose_digest_was_taken_of_damaged_bytes_is_made_again_and_no_other(tiny: RunFile, name: str) -> None:
    whole = carry_out(tiny, CACHE)
    _damage_before_the_digest(_cache(tiny), name)
    written = {path.name: path.stat().st_mtime_ns for path in _cache(tiny).glob("*.tar")}
    repaired = _repair(tiny)
    assert repaired.content == whole.content and repaired.facts == whole.facts
    again = {path for path, then in written.items() if (_cache(tiny) / path).stat().st_mtime_ns != then}
    number = name.removeprefix("heldout-").partition("-")[2]
    prefix = "heldout-" if name.startswith("heldout-") else ""
    assert again == {f"{prefix}{recording}-{number}" for recording in ("sampled", "topk")}


def test_notes_that_a_kill_left_do_not_speak_for_a_shard_in_quarantine(tiny: RunFile, tmp_path: Path) -> None:
    """Of a kill between the manifest and the removal of the work folder: all its notes agree with the damage."""
    whole = carry_out(tiny, CACHE)
    _damage_before_the_digest(_cache(tiny), DAMAGED[0])
    manifest = read_manifest(_cache(tiny))
    assert manifest is not None
    shutil.copytree(_cache(tiny), tmp_path / "elsewhere")

    reopen(tmp_path / "elsewhere", manifest)
    shutil.copytree(tmp_path / "elsewhere" / "work", _cache(tiny) / "work")
    assert _repair(tiny).content == whole.content


def test_a_ranking_that_is_damaged_is_written_again(tiny: RunFile) -> None:
    whole = carry_out(tiny, CACHE)
    path = _cache(tiny) / RANKING_NAME
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    assert _repair(tiny).content == whole.content


def test_a_ranking_whose_digest_was_taken_of_damaged_bytes_is_written_again(tiny: RunFile) -> None:
    whole = carry_out(tiny, CACHE)
    folder, manifest = _cache(tiny), read_manifest(_cache(tiny))
    assert manifest is not None
    path = folder / RANKING_NAME
    path.write_bytes(path.read_bytes()[::-1])
    files = content_files(folder)
    finish(folder, manifest.model_copy(update={"files": files, "content": content_of(files)}))
    assert _repair(tiny).content == whole.content


@pytest.mark.parametrize("what", ["a member's place", "the loss", "all of them"])
def test_a_damaged_sidecar_is_not_believed_and_its_shard_is_made_again(
    tiny: RunFile, tmp_path: Path, what: str
) -> None:
    """Of a kill before the manifest: what is sealed is what an undisturbed run seals."""
    whole = carry_out(tiny, CACHE)
    folder = _cache(tiny)
    _unfinish(folder)
    sidecar, note = folder / "work/shards/sampled-000001.json", folder / "work/scored/000000.json"
    text = sidecar.read_text()
    if what != "the loss":
        place = text.index('"offset":[') + len('"offset":[')
        sidecar.write_text(text[:place] + "1024" + text[text.index("]", place) :])
    if what != "a member's place":
        text = note.read_text()
        place = text.index('"label_loss":') + len('"label_loss":')
        note.write_text(text[:place] + "1" + text[place:])
    made = carry_out(tiny, CACHE)
    assert made.content == whole.content and made.facts == whole.facts and made.shard_sets == whole.shard_sets
    list(verify(folder))


def _unfinish(folder: Path) -> None:

    manifest = read_manifest(folder)
    assert manifest is not None
    assert reopen(folder, manifest)


def test_no_mutation_of_a_sidecar_or_a_scored_note_is_read_as_other_values(
    tiny: RunFile, context_of: Callable[[RunFile], StageContext]
) -> None:
    carry_out(tiny, CACHE)
    _unfinish(_cache(tiny))
    context = context_of(tiny)
    scorer = ShardScorer(prepare(context))
    sound = [scorer.finished(index) for index in range(len(scorer.job.source.shards))]
    assert all(sound)
    notes = sorted(path for name in ("shards", "scored") for path in (context.folder / "work" / name).iterdir())
    texts = {path: path.read_bytes() for path in notes}
    chance, accepted = random.Random(SEED), Counter[str]()
    for number in range(NUM_MUTATIONS):
        path = chance.choice(notes)
        kind = chance.choice(list(MUTATIONS))
        path.write_bytes(MUTATIONS[kind](texts[path], texts[chance.choice(notes)], chance))
        for index in _shards_of(path, scorer):
            found = scorer.finished(index)
            assert found is None or found == sound[index], f"CAPGAP_SEED={SEED}, mutation {number}: {kind} of {path}"
            accepted[kind] += found is not None
        path.write_bytes(texts[path])
    # those that change nothing: a digit put in the place of the same digit, a note in its own place
    assert accepted.total() < NUM_MUTATIONS / 4
    print(f"{NUM_MUTATIONS} mutations, seed {SEED}: {accepted.total()} change nothing: {dict(accepted)}")


def _shards_of(path: Path, scorer: ShardScorer) -> list[int]:
    number = int(path.stem.split("-")[-1])
    return [number + scorer.job.num_training if path.stem.startswith("heldout") else number]


def _flipped(data: bytes, _: bytes, chance: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 3])):
        spoilt[chance.randrange(len(spoilt))] ^= 1 << chance.randrange(8)
    return bytes(spoilt)


def _digit(data: bytes, _: bytes, chance: random.Random) -> bytes:
    spoilt = bytearray(data)
    places = [place for place, byte in enumerate(spoilt) if chr(byte).isdigit()]
    spoilt[chance.choice(places)] = ord(chance.choice("0123456789"))
    return bytes(spoilt)


def _cut(data: bytes, _: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def _value(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """Valid JSON of the same layout with another number or word somewhere, as a program would write it."""
    whole = json.loads(data)
    places = list(_places(whole))
    *outer, last = chance.choice(places)
    inner: Any = whole
    for key in outer:
        inner = inner[key]
    old = inner[last]
    inner[last] = old * chance.choice([0, 0.5, 2]) if isinstance(old, float) else _other(old, chance)
    return json.dumps(whole, separators=(",", ":")).encode()


def _other(old: Any, chance: random.Random) -> Any:
    return old + chance.choice([-1, 1, 512]) if isinstance(old, int) else f"{old}0"


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if not isinstance(value, (dict, list)):
        yield path
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _places(inner, (*path, key))


def _exchanged(_: bytes, other: bytes, __: random.Random) -> bytes:
    return other


def _spliced(data: bytes, other: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + other[place:]


MUTATIONS: dict[str, Callable[[bytes, bytes, random.Random], bytes]] = {
    "flip": _flipped,
    "digit": _digit,
    "cut": _cut,
    "value": _value,
    "exchange": _exchanged,
    "splice": _spliced,
}


def test_a_note_of_one_shard_does_not_speak_for_another(
    tiny: RunFile, context_of: Callable[[RunFile], StageContext]
) -> None:
    carry_out(tiny, CACHE)
    _unfinish(_cache(tiny))
    scorer = ShardScorer(prepare(context_of(tiny)))
    work = _cache(tiny) / "work"
    for name in ("shards/sampled-00000{}.json", "shards/topk-00000{}.json", "scored/00000{}.json"):
        shutil.copy(work / name.format(0), work / name.format(1))
    first: FinishedShard | None = scorer.finished(0)
    assert first is not None and scorer.finished(1) is None
