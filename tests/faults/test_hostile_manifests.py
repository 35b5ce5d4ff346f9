"""Manifests of a stranger's, each sealed anew: every kind is refused by whoever reads the cache, in one line.

`CAPGAP_SEED` chooses other places for what is put anywhere.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.stage.identity import content_of, seal_of
from capgap.pipeline.stage.manifests import read_manifest, require_seal
from capgap.pipeline.store import ShardReader
from capgap.pipeline.verify.verify import verify
from capgap.schemas.errors import CapgapError
from capgap.schemas.manifest import Manifest

Values = dict[str, Any]
CHANCE = random.Random(int(os.environ.get("CAPGAP_SEED", "3")))


def shards(manifest: Values) -> list[Values]:
    return manifest["shard_sets"]["sampled"]["shards"]


def rename(manifest: Values, path: str) -> None:
    """A shard, and its line among the files."""
    old = shards(manifest)[0]["file"]["path"]
    for file in (shards(manifest)[0]["file"], *manifest["files"]):
        if file["path"] == old:
            file["path"] = path


def member(manifest: Values, name: str, value: object) -> None:
    shards(manifest)[0]["members"][name][0] = value


def setting(manifest: Values, name: str, value: object) -> None:
    manifest["shard_sets"]["sampled"]["codec_settings"][name] = value


def exchange(manifest: Values) -> None:
    """Every digest is right, and each of two shards is described in the place of the other."""
    first, second = shards(manifest)[:2]
    first["file"], second["file"] = second["file"], first["file"]


def exchange_members(manifest: Values) -> None:
    first, second = shards(manifest)[:2]
    first["members"], second["members"] = second["members"], first["members"]


def deep(manifest: Values) -> None:
    inner: list[Any] = []
    for _ in range(600):
        inner = [inner]
    manifest["facts"]["deep"] = inner


def twice(manifest: Values) -> None:
    shards(manifest).append(shards(manifest)[0])
    manifest["files"].append(shards(manifest)[0]["file"])


def overlapping(manifest: Values) -> None:
    for name, value in (("offset", 512), ("num_bytes", 1 << 20)):
        member(manifest, name, value)


HOSTILE: dict[str, Callable[[Values], object]] = {
    "out of the folder": lambda m: rename(m, "../corpus/manifest.json"),
    "from the root": lambda m: rename(m, "/etc/passwd"),
    "by way of a folder": lambda m: rename(m, "a/../../b.tar"),
    "of another system": lambda m: rename(m, "..\\..\\b.tar"),
    "a drive": lambda m: rename(m, "C:\\b.tar"),
    "another case": lambda m: rename(m, "SAMPLED-000000.tar"),
    "another form of a letter": lambda m: rename(m, "e\u0301.tar"),
    "an escape": lambda m: rename(m, "a\x1b[2J.tar"),
    "right to left": lambda m: rename(m, "a\u202egpj.tar"),
    "two lines": lambda m: rename(m, "a\ncapgap: all is well.tar"),
    "a flag": lambda m: rename(m, "--remake.tar"),
    "a long name": lambda m: rename(m, "a" * 5000 + ".tar"),
    "nothing": lambda m: rename(m, ""),
    "the manifest itself": lambda m: rename(m, "manifest.json"),
    "a device": lambda m: rename(m, "/dev/zero"),
    "no such file": lambda m: rename(m, "sampled-999999.tar"),
    "a shard twice": twice,
    "two exchanged": exchange,
    "members exchanged": exchange_members,
    "overlapping members": overlapping,
    "a member before the shard": lambda m: member(m, "offset", -512),
    "a member behind the shard": lambda m: member(m, "offset", 1 << 40),
    "a member without bytes": lambda m: member(m, "num_bytes", 0),
    "a member of nothing": lambda m: member(m, "num_sequences", 0),
    "more sequences": lambda m: member(m, "num_sequences", 1 << 40),
    "half a sequence": lambda m: member(m, "num_sequences", 0.5),
    "a number as text": lambda m: member(m, "crc32", "NaN"),
    "an infinite number": lambda m: member(m, "offset", float("inf")),
    "no number": lambda m: member(m, "offset", float("nan")),
    "an exponent": lambda m: member(m, "num_bytes", 1e300),
    "a number of 70 bits": lambda m: member(m, "crc32", 1 << 70),
    "more members than there are": lambda m: shards(m)[0]["members"]["offset"].append(1 << 30),
    "no member": lambda m: shards(m)[0].update(members={}, num_sequences=0),
    "more targets": lambda m: m["shard_sets"]["sampled"].update(seq_len=1 << 23),
    "no targets": lambda m: m["shard_sets"]["sampled"].update(seq_len=0),
    "another codec": lambda m: m["shard_sets"]["sampled"].update(codec="pickle-1"),
    "a codec of another kind": lambda m: m["shard_sets"]["sampled"].update(codec="topk-compact-1"),
    "a huge vocabulary": lambda m: setting(m, "vocab_size", 1 << 40),
    "a small vocabulary": lambda m: setting(m, "vocab_size", 3),
    "a ranking elsewhere": lambda m: setting(m, "ranking", "../corpus/manifest.json"),
    "a setting more": lambda m: setting(m, "load", "os.system"),
    "another stage": lambda m: m.update(stage="corpus\x1b[31m"),
    "another instance": lambda m: m.update(instance="cache; rm -rf ~"),
    "another format": lambda m: m.update(format="capgap-manifest-2"),
    "a key more": lambda m: m.update(__reduce__="os.system"),
    "no number among the facts": lambda m: m["facts"].update(x=float("nan")),
    "depth": deep,
    "a digest of another kind": lambda m: m["files"][0].update(sha256="../../x"),
    "a digest in capitals": lambda m: m["files"][0].update(sha256=m["files"][0]["sha256"].upper()),
    "a size of its own": lambda m: m["files"][0].update(num_bytes=m["files"][0]["num_bytes"] + 1),
    "text anywhere": lambda m: CHANCE.choice(shards(m))["members"].update(crc32="\ud800"),
}


def sealed(text: str) -> str:
    """With a seal and a content that agree, where a manifest can be made of it at all, as a stranger would."""
    try:
        made = Manifest.model_validate_json(text)
        made = made.model_copy(update={"content": content_of(made.files, made.sources)})
        return made.model_copy(update={"seal": seal_of(made)}).model_dump_json()
    except (ValueError, RecursionError):
        return text


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_manifest_is_refused_in_one_line(made: Path, tmp_path: Path, kind: str) -> None:
    cache = made / "cache"
    values = json.loads((cache / "manifest.json").read_text())
    HOSTILE[kind](values)
    folder = tmp_path / "cache"
    folder.mkdir()
    for path in cache.iterdir():
        if path.name not in ("manifest.json", "work.json"):
            (folder / path.name).symlink_to(path)
    (folder / "manifest.json").write_text(sealed(json.dumps(values)))
    with pytest.raises(CapgapError) as caught:
        list(verify(folder))
    refusals = [caught.value]
    # what no reader goes by, only `verify` finds
    try:
        read_all(folder)
    except CapgapError as error:
        refusals.append(error)
    for error in refusals:
        assert error.exit_code in (2, 4)
        assert str(error).isprintable()


def read_all(folder: Path) -> None:
    """As a training does."""
    manifest = read_manifest(folder)
    assert manifest is not None
    require_seal(folder, manifest)
    reader = ShardReader(folder, manifest.shard_sets["sampled"])
    for number, shard in enumerate(manifest.shard_sets["sampled"].shards):
        for each in range(len(shard.members)):
            reader.read_member(number, each)
