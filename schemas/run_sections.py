"""The sections of a run file: every setting of a run, and which stages they ask for.

A section that is written asks for its stage; one that is left out is not made and not asked for. In Python every
section has its defaults, whether it was written or not; `has` and `makes` tell the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from capgap.schemas.base import OPERATIONAL, PartOf, Record, below
from capgap.schemas.run_align import AlignSettings
from capgap.schemas.run_benchmark import BenchmarkSettings
from capgap.schemas.run_cache import CacheSettings
from capgap.schemas.run_corpus import CorpusSettings
from capgap.schemas.run_eval import EvalSettings
from capgap.schemas.run_judge import JudgeSettings
from capgap.schemas.run_model import StudentSettings, TeacherSettings
from capgap.schemas.run_rounds import RoundsSettings
from capgap.schemas.run_train import TrainSettings
from capgap.schemas.run_tune import TuneSettings

ReusableStage = Literal["corpus", "teacher", "cache"]

# What asks for no stage of its own; every other field of a run file is a section.
_NO_SECTIONS = ("name", "out", "seeds", "device", "reuse", "arms")


class RunSections(Record):
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
    """Finished folders of another run to use in place of a stage, for example one cache for many students: a cache is
    enough to train from, for it carries tokenizer, context rule and held-out sequences. It may lie behind a URL,
    s3:// and others: its shards pass through a disk cache (CAPGAP_DOWNLOADS, CAPGAP_DOWNLOADS_GB)."""

    corpus: CorpusSettings = Field(default_factory=CorpusSettings)
    """Text, tokenizer, packing and splits."""

    teacher: TeacherSettings = Field(default_factory=TeacherSettings)
    """The model whose distributions are kept."""

    cache: CacheSettings = Field(default_factory=CacheSettings)
    """How the teacher's distributions are kept."""

    align: AlignSettings | None = None
    """How the cache becomes one for students of another tokenizer, who then learn from that."""

    student: StudentSettings = Field(default_factory=StudentSettings)
    """The model that is trained."""

    train: TrainSettings = Field(default_factory=TrainSettings)
    """How the student is trained from the cache."""

    arms: dict[str, Annotated[dict[str, Any], PartOf(TrainSettings)]] = Field(default={"distilled": {}})
    """Variants of `train`, each with the settings in which it differs, for example `cross_entropy: {alpha: 0}`."""

    rounds: RoundsSettings | None = None
    """Text that models write, in the place of the corpus's: `cache` and `train` are made of it, round after round."""

    tune: TuneSettings | None = None
    """How trained students become chat models."""

    eval: EvalSettings = Field(default_factory=EvalSettings)
    """How models are measured; the report is made of what is measured."""

    benchmarks: BenchmarkSettings | None = None
    """Tasks of lm-eval that models are measured on."""

    judge: JudgeSettings | None = None
    """Who judges the models' answers to questions."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_null(cls, values: Any) -> Any:
        """A section that is null is one that was left out."""
        if not isinstance(values, Mapping):
            return values
        return {name: value for name, value in values.items() if value is not None or name in _NO_SECTIONS}

    @model_serializer(mode="wrap")
    def _write_what_was_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Sections that were left out stay out, so that what is read back asks for the same stages."""
        values: dict[str, Any] = write(self)
        left_out = set(values) - set(_NO_SECTIONS) - self.model_fields_set
        if "train" not in self.sections:
            left_out.add("arms")
        return {name: value for name, value in values.items() if name not in left_out}

    @property
    def sections(self) -> frozenset[str]:
        """The sections that were written; `arms` stands for `train`, whose variants they are."""
        written = self.model_fields_set - set(_NO_SECTIONS)
        return frozenset(written | ({"train"} if "arms" in self.model_fields_set else set()))

    def written(self) -> dict[str, Any]:
        """The run file at its shortest: every section that was written, with the settings that are no defaults."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return values | {name: {} for name in sorted(self.model_fields_set - set(_NO_SECTIONS)) if name not in values}

    def makes(self, section: str) -> bool:
        """Whether the run makes the stage of that section itself."""
        return section in self.sections and section not in self.reuse

    def has(self, section: str) -> bool:
        """Whether the run has that stage's result, made here or reused."""
        return section in self.sections or section in self.reuse

    def asks_teacher(self, section: Literal["benchmarks", "judge"]) -> bool:
        """Whether benchmarks, or questions, are put to the teacher too: where there is one, unless told otherwise."""
        settings = self.benchmarks if section == "benchmarks" else self.judge
        return settings is not None and settings.teacher and self.has_teacher_model

    @property
    def has_teacher_model(self) -> bool:
        """Whether there is a teacher to put on a device here; one that is served elsewhere is none."""
        return self.has("teacher") and not ("teacher" in self.sections and self.teacher.served is not None)

    @property
    def measures_teacher(self) -> bool:
        """Whether `eval` holds students against the teacher itself, or the cache alone stands for it."""
        return self.eval.teacher != "cache" and self.has_teacher_model and not self.has("align")

    def train_settings(self, arm: str, round_number: int | None = None) -> TrainSettings:
        """The settings of `train` with the arm's own in their place; for one training of a run with rounds, its own.

        Raises:
            ValueError: the arm is unknown or names a setting that `train` does not have.
        """
        if arm not in self.arms:
            raise ValueError(f"arms: found no {arm!r}, expected one of {', '.join(sorted(self.arms))}")
        try:
            settings = TrainSettings.model_validate({**self.train.model_dump(), **self.arms[arm]})
        except ValidationError as error:
            raise below(error, "arms", arm) from None
        later = settings.later_learning_rate
        if round_number is None or later is None:
            return settings
        rate = later if round_number > 0 else settings.learning_rate
        return settings.model_copy(update={"learning_rate": rate, "later_learning_rate": None})
