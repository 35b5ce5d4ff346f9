"""The sections of a run file: every setting of a run, and which stages they request.

A section that is written requests its stage; without the section, the stage does not run. In Python every section has
its defaults, whether it was written or not; `has` and `makes` tell the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from capgap.schemas.base import OPERATIONAL, PartOf, Record, below
from capgap.schemas.home import PATH
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

# Fields of a run file that request no stage; every other field is a section.
_NO_SECTIONS = ("name", "out", "seeds", "device", "reuse", "arms")


class RunSections(Record):
    """Every setting of a run."""

    name: str
    """Name of the run, shown in its report."""

    out: Annotated[str, PATH] = Field(json_schema_extra=OPERATIONAL)
    """Folder that receives one folder per stage."""

    seeds: tuple[int, ...] = (0,)
    """Seeds of the students: one student is trained per seed and arm. Arms of one seed share initial weights and data
    order, so that they can be compared in pairs. Several seeds show how much a result varies."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", json_schema_extra=OPERATIONAL)
    """Where models run. `auto` takes a GPU if there is one."""

    reuse: Annotated[dict[ReusableStage, str], PATH] = Field(default_factory=dict)
    """Finished stage folders of another run, used in place of a stage, for example one cache for many students. A cache
    is enough to train from: it holds tokenizer, context rule and held-out sequences. A cache may be a URL (s3:// and
    others); its shards are then kept in the folder CAPGAP_DOWNLOADS, up to CAPGAP_DOWNLOADS_GB."""

    corpus: CorpusSettings = Field(default_factory=CorpusSettings)
    """Text, tokenizer, packing and splits."""

    teacher: TeacherSettings = Field(default_factory=TeacherSettings)
    """The model whose distributions the students learn from."""

    cache: CacheSettings = Field(default_factory=CacheSettings)
    """How the teacher's distributions are computed and stored."""

    align: AlignSettings | None = None
    """How the cache is converted for students that have another tokenizer than the teacher."""

    student: StudentSettings = Field(default_factory=StudentSettings)
    """The model that is trained."""

    train: TrainSettings = Field(default_factory=TrainSettings)
    """How the student is trained from the cache."""

    arms: dict[str, Annotated[dict[str, Any], PartOf(TrainSettings)]] = Field(default={"distilled": {}})
    """Variants of `train` by name, each with the settings that differ, for example `cross_entropy: {alpha: 0}`."""

    rounds: RoundsSettings | None = None
    """Train in rounds on text that the models write: in each, a model writes, the teacher scores it, students train."""

    tune: TuneSettings | None = None
    """How trained students become chat models."""

    eval: EvalSettings = Field(default_factory=EvalSettings)
    """How models are measured on held-out text. The report shows the results."""

    benchmarks: BenchmarkSettings | None = None
    """Tasks of lm-eval (the Language Model Evaluation Harness) that models are measured on."""

    judge: JudgeSettings | None = None
    """The language model that judges the models' answers to questions, and how it is asked."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_null(cls, values: Any) -> Any:
        """Treat a section that is null as one that was left out."""
        if not isinstance(values, Mapping):
            return values
        return {name: value for name, value in values.items() if value is not None or name in _NO_SECTIONS}

    @model_serializer(mode="wrap")
    def _write_what_was_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the sections that were not written, so that the file read back requests the same stages."""
        values: dict[str, Any] = write(self)
        left_out = set(values) - set(_NO_SECTIONS) - self.model_fields_set
        if "train" not in self.sections:
            left_out.add("arms")
        return {name: value for name, value in values.items() if name not in left_out}

    @property
    def sections(self) -> frozenset[str]:
        """The names of the sections that were written. `arms` counts as `train`, because arms are variants of it."""
        written = self.model_fields_set - set(_NO_SECTIONS)
        return frozenset(written | ({"train"} if "arms" in self.model_fields_set else set()))

    def written(self) -> dict[str, Any]:
        """Return the shortest form of the run file: every written section, with the settings that are not defaults."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return values | {name: {} for name in sorted(self.model_fields_set - set(_NO_SECTIONS)) if name not in values}

    def makes(self, section: str) -> bool:
        """Return whether the run makes the stage of this section itself, rather than reusing a finished one."""
        return section in self.sections and section not in self.reuse

    def has(self, section: str) -> bool:
        """Return whether the run has the result of this section's stage, made here or reused."""
        return section in self.sections or section in self.reuse

    def asks_teacher(self, section: Literal["benchmarks", "judge"]) -> bool:
        """Return whether the teacher is measured by `benchmarks`, or answers the questions of `judge`, too."""
        settings = self.benchmarks if section == "benchmarks" else self.judge
        return settings is not None and settings.teacher and self.has_teacher_model

    @property
    def has_teacher_model(self) -> bool:
        """Whether the run has a teacher to put on a device of this machine, and not one that only a server runs."""
        return self.has("teacher") and not ("teacher" in self.sections and self.teacher.served is not None)

    @property
    def measures_teacher(self) -> bool:
        """Whether `eval` compares students with the teacher itself, and not only with the cache."""
        return self.eval.teacher != "cache" and self.has_teacher_model and not self.has("align")

    def train_settings(self, arm: str, round_number: int | None = None) -> TrainSettings:
        """Return the settings of `train` for one arm, with the arm's own values in place of the shared ones.

        Args:
            arm: name of the arm.
            round_number: round of the training, from 0, in a run with rounds. It decides the learning rate.

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
