"""What a stage is handed and what it hands back.

driver --StageContext--> stage.run(context) --StageResult--> manifest.json
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capgap.pipeline.stage.ranks import Ranks
from capgap.pipeline.store import folder_with, is_url
from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.manifest import Manifest, ShardSet
from capgap.schemas.run_file import RunFile

FINAL = -1
"""The round of what a final student writes to be measured: after all rounds, however many there are."""

CHAT_CACHE = "caches/chat"
"""The name of the input that `tune.cache` is."""


@dataclass(frozen=True)
class Instance:
    """One run of a stage: `train` and `tune` run once per arm and seed, `student` once per seed, `benchmark` and
    `answers` once per student that comes out and for the teacher, the others once. In a run with rounds, `generate`,
    `cache` and `train` have a round as well."""

    stage: str
    arm: str | None = None
    seed: int | None = None
    round: int | None = None

    @property
    def name(self) -> str:
        """Path of the instance's folder below the run's, for example `train/distilled/seed-0`."""
        parts = [self.stage, self.arm, None if self.seed is None else f"seed-{self.seed}"]
        if self.round is not None:
            parts.append("final" if self.round == FINAL else f"round-{self.round}")
        return "/".join(part for part in parts if part is not None)


@dataclass(frozen=True)
class StageInput:
    """A finished folder that a stage reads.

    Attributes:
        location: path of the folder, or its URL.
        manifest: what stands in it.
    """

    location: Path | str
    manifest: Manifest

    @property
    def is_remote(self) -> bool:
        """Whether it lies behind a URL, from where shards and small files are read."""
        return is_url(self.location)

    def fetch(self, folder: str) -> Path:
        """One of its folders of small files, for example `tokenizer`, on a local disk and as the manifest lists it.

        Raises:
            CorruptError: a file is not what the manifest lists.
            InputError: as `path` for all but a cache; or a file is missing, or the manifest of a cache behind a URL
                lists none of this folder.
        """
        if self.manifest.read_as != "cache":
            self.require_local()
        files = [file for file in self.manifest.files if file.path.startswith(f"{folder}/")]
        if self.is_remote and not files:
            raise InputError(
                f"the folder {folder} is missing",
                where=self.location,
                found=f"no file of it in the manifest of this {self.manifest.stage}",
                fix="upload the whole folder of the stage again",
            )
        return folder_with(self.location, files) / folder

    @property
    def path(self) -> Path:
        """The folder on a local disk.

        Raises:
            InputError: it lies behind a URL; only shards and small files are read from there.
        """
        self.require_local()
        return Path(self.location)

    def require_local(self) -> None:
        """Raise InputError if it lies behind a URL."""
        if self.is_remote:
            raise InputError(
                "must lie on a local disk",
                where=f"reuse.{self.manifest.stage}",
                found=self.location,
                expected="a path; only a cache is read from a URL",
                fix="download the folder and name that",
            )


@dataclass(frozen=True)
class StageContext:
    """Everything a stage needs.

    Attributes:
        run: the run file with its defaults.
        instance: which run of the stage this is.
        folder: the stage's own folder; it exists, and may hold what a killed run left.
        inputs: finished folders, by the name of their instance.
        device: `cpu` or `cuda:0`; the stage holds the lease on it, unless its replicas hold those of their GPUs.
            A rank's own, where several processes train.
        holder: stage and run, as a lease names them.
        wait: wait for a device that another stage holds.
        group: under which the stage's replicas share its lease; empty where each holds one of its own.
        ranks: which process of the stage's this is; the first alone writes to the folder.
    """

    run: RunFile
    instance: Instance
    folder: Path
    inputs: dict[str, StageInput]
    device: str
    holder: str = ""
    wait: bool = True
    group: str = ""
    ranks: Ranks = field(default_factory=Ranks)

    def input(self, name: str) -> StageInput:
        """The input made by the instance of that name."""
        return self.inputs[name]


@dataclass(frozen=True)
class StageResult:
    """What a stage adds to its manifest; the files of its folder are listed and hashed by the driver."""

    facts: dict[str, Any] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    shard_sets: dict[str, ShardSet] = field(default_factory=dict)


def further_cache(name: str) -> str:
    """The name of the input that `train.caches.NAME` is."""
    return f"caches/{name}"


def text_of_cache(name: str | None) -> str:
    """The name of the input that is the text of a round's cache, where a student wrote it."""
    return "text" if name is None else f"texts/{name}"


@dataclass(frozen=True)
class Slice:
    """Which units a process makes: those with `index % count == number`, or with no number whichever nobody has."""

    number: int | None
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Slice:
        """`0/8` to `7/8`, or `any`.

        Raises:
            SettingError: it is something else.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if text == "any":
            return cls(None)
        if found is None or int(found[1]) >= int(found[2]):
            raise SettingError(
                "no such slice", where="--slice", found=text, expected="i/n with i from 0 to n - 1, or any"
            )
        return cls(int(found[1]), int(found[2]))

    def has(self, index: int) -> bool:
        """Whether unit `index` is this slice's to make."""
        return self.number is None or index % self.count == self.number

    def __str__(self) -> str:
        return "any" if self.number is None else f"{self.number}/{self.count}"
