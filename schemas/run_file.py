"""The run file: the one YAML that names every stage of a run and is the only place where a setting is defined.

    run file --> stage instances --> one folder each under `out`, with a manifest

Flags of the command line are derived from these models (`--train.learning_rate 1e-3`) and win over the YAML.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from capgap.schemas.base import OPERATIONAL, PartOf, Record, below
from capgap.schemas.results import TEACHER
from capgap.schemas.run_benchmark import BenchmarkSettings
from capgap.schemas.run_cache import CacheSettings
from capgap.schemas.run_corpus import CorpusSettings
from capgap.schemas.run_eval import EvalSettings
from capgap.schemas.run_judge import JudgeSettings
from capgap.schemas.run_model import StudentSettings, TeacherSettings
from capgap.schemas.run_train import TrainSettings
from capgap.schemas.run_tune import TuneSettings

_OPTIONAL = ("tune", "benchmarks", "judge")

ReusableStage = Literal["corpus", "teacher", "cache"]


class RunFile(Record):
    """Every setting of a run."""

    name: str
    """Name of the run, shown in its report."""

    out: str = Field(json_schema_extra=OPERATIONAL)
    """Folder that receives one folder per stage."""

    seeds: tuple[int, ...] = (0,)
    """One student per seed and arm. Arms of one seed share initial weights and data order, so they are paired."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", json_schema_extra=OPERATIONAL)
    """Where models run. `auto` takes a GPU if there is one."""

    reuse: dict[ReusableStage, str] = Field(default_factory=dict)
    """Finished folders of another run to use in place of a stage, for example one cache for many students. A cache may
    lie behind a URL, s3:// and others: its shards pass through a disk cache (CAPGAP_DOWNLOADS, CAPGAP_DOWNLOADS_GB)."""

    corpus: CorpusSettings = Field(default_factory=CorpusSettings)
    """Text, tokenizer, packing and splits."""

    teacher: TeacherSettings
    """The model whose distributions are kept."""

    cache: CacheSettings = Field(default_factory=CacheSettings)
    """How the teacher's distributions are kept."""

    student: StudentSettings
    """The model that is trained."""

    train: TrainSettings = Field(default_factory=TrainSettings)
    """How the student is trained from the cache."""

    arms: dict[str, Annotated[dict[str, Any], PartOf(TrainSettings)]] = Field(default={"distilled": {}})
    """Variants of `train`, each with the settings in which it differs, for example `cross_entropy: {alpha: 0}`."""

    tune: TuneSettings | None = None
    """How trained students become chat models; left out, there is no such stage."""

    eval: EvalSettings = Field(default_factory=EvalSettings)
    """How models are measured."""

    benchmarks: BenchmarkSettings | None = None
    """Tasks of lm-eval that models are measured on; none where the section is left out."""

    judge: JudgeSettings | None = None
    """Who judges the models' answers to questions; leave it out for none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: found {list(self.seeds)}, expected at least one, none twice, none negative")
        if not self.arms:
            raise ValueError("arms: found none, expected at least one; leave the setting out for `distilled` alone")
        for name in (self.name, *self.arms):
            _require_folder_name(name)
        for arm in self.arms:
            self.train_settings(arm)
        if self.benchmarks is not None and self.benchmarks.teacher and TEACHER in self.arms:
            raise ValueError(f"arms: found {TEACHER!r}, expected another name where benchmarks measure the teacher")
        if self.judge is not None:
            self.judge.require_no_key()
        if self.judge is not None and self.judge.teacher and TEACHER in self.arms:
            raise ValueError(f"arms: found {TEACHER!r}, which the teacher is called beside the arms; rename the arm")
        return self

    def decisive(self) -> dict[str, Any]:
        """As for every record, and nothing of the sections that are left out."""
        values = super().decisive()
        return {name: value for name, value in values.items() if name not in _OPTIONAL or value is not None}

    def train_settings(self, arm: str) -> TrainSettings:
        """The settings of `train` with the arm's own in their place.

        Raises:
            ValueError: the arm is unknown or names a setting that `train` does not have.
        """
        if arm not in self.arms:
            raise ValueError(f"arms: found no {arm!r}, expected one of {', '.join(sorted(self.arms))}")
        try:
            return TrainSettings.model_validate({**self.train.model_dump(), **self.arms[arm]})
        except ValidationError as error:
            raise below(error, "arms", arm) from None


def _require_folder_name(value: str) -> None:
    if not value or value.startswith(".") or any(not (c.isalnum() or c in "-_.") for c in value):
        raise ValueError(f"name, arms: found {value!r}, expected a folder's name: letters, digits, '-', '_' and '.'")
