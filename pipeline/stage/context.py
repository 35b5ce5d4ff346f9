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
"""Value of `Instance.round` for the text that a final student writes to be measured, after all numbered rounds."""

CHAT_CACHE = "caches/chat"
"""Name of the input for the cache that `tune.cache` names."""


@dataclass(frozen=True)
class Instance:
    """One run of a stage. `train` and `tune` run once per arm and seed, and `student` once per seed. `benchmark` and
    `answers` run once per final student and once for the teacher, and every other stage runs once. In a run with
    rounds, each instance of `generate`, `cache` and `train` also belongs to a round."""

    stage: str
    arm: str | None = None
    seed: int | None = None
    round: int | None = None

    @property
    def name(self) -> str:
        """The path of the instance's folder below the run's folder, for example `train/distilled/seed-0`."""
        parts = [self.stage, self.arm, None if self.seed is None else f"seed-{self.seed}"]
        if self.round is not None:
            parts.append("final" if self.round == FINAL else f"round-{self.round}")
        return "/".join(part for part in parts if part is not None)


@dataclass(frozen=True)
class StageInput:
    """The folder of a finished stage that another stage reads.

    Attributes:
        location: Path of the folder, or its URL.
        manifest: The manifest of the folder.
    """

    location: Path | str
    manifest: Manifest

    @property
    def is_remote(self) -> bool:
        """Whether the folder lies behind a URL, so that only shards and small files can be read from it."""
        return is_url(self.location)

    def fetch(self, folder: str) -> Path:
        """Return one folder of small files, for example `tokenizer`, on a local disk and checked against the manifest.

        Raises:
            CorruptError: A file differs from what the manifest lists.
            InputError: The input lies behind a URL and is not a cache; or a file is missing; or the manifest of a
                cache behind a URL lists no file of this folder.
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
            InputError: The folder lies behind a URL, from where only shards and small files are read.
        """
        self.require_local()
        return Path(self.location)

    def require_local(self) -> None:
        """Raise InputError if the folder lies behind a URL."""
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
    """Everything that a stage needs for its work.

    Attributes:
        run: The run file, with defaults filled in.
        instance: The instance of the stage that is to be made.
        folder: The stage's own folder. It exists, and may hold what a killed process left.
        inputs: Finished folders that the stage reads, by the name of the instance that made them.
        device: `cpu` or `cuda:0`. The stage holds the lease on it, unless its replicas hold the leases on their GPUs.
            Where several processes train, it is the device of this rank.
        holder: Stage and run, as a lease names its holder.
        wait: Whether to wait for a device that another stage holds.
        group: Name under which the stage's replicas share its lease; empty where each replica holds its own.
        ranks: Rank of this process among the stage's processes. Only the first rank writes to the folder.
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
        """Return the input that the instance of this name made."""
        return self.inputs[name]


@dataclass(frozen=True)
class StageResult:
    """What a stage adds to its manifest; the files of its folder are listed and hashed by the driver."""

    facts: dict[str, Any] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    shard_sets: dict[str, ShardSet] = field(default_factory=dict)


def further_cache(name: str) -> str:
    """Return the name of the input for the cache that `train.caches.NAME` names."""
    return f"caches/{name}"


def text_of_cache(name: str | None) -> str:
    """Return the name of the input that is the text behind a round's cache, where a student wrote that text."""
    return "text" if name is None else f"texts/{name}"


@dataclass(frozen=True)
class Slice:
    """The units that one process makes: those with `index % count == number`, or without a number any unclaimed one."""

    number: int | None
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Slice:
        """Read a slice from text: `0/8` to `7/8` for one of eight, or `any`.

        Raises:
            SettingError: The text is neither.
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
        """Return whether this slice includes unit `index`."""
        return self.number is None or index % self.count == self.number

    def __str__(self) -> str:
        return "any" if self.number is None else f"{self.number}/{self.count}"
