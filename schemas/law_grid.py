"""The grid file: teachers x students x inits x token budgets x alphas x seeds, as one YAML.

    grid file --pipeline/law/expand--> run files: one for the corpus, one a teacher, one a student x teacher x seed

The supervised arm (alpha 0, no teacher) stands in every grid, for each student, budget and seed, and of pruned students
for each teacher too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from capgap.schemas.base import OPERATIONAL, PartOf, Record, below
from capgap.schemas.law import Init
from capgap.schemas.run_cache import CacheSettings
from capgap.schemas.run_corpus import CorpusSettings
from capgap.schemas.run_eval import EvalSettings
from capgap.schemas.run_model import StudentSettings, TeacherSettings
from capgap.schemas.run_optimization import OptimizationSettings
from capgap.schemas.run_prune import PruneSettings
from capgap.schemas.run_train import TrainSettings

_R = TypeVar("_R", bound=Record)

SUPERVISED = "supervised"
"""Stands where a teacher's name would, in folders and in names of arms."""

# What a student's shape and the target of pruning have in common.
_SIZES = ("num_layers", "hidden_size", "num_heads", "num_key_value_heads", "intermediate_size")


class Budget(Record):
    """How long students train: one rule for all of them."""

    tokens: int | None = Field(None, ge=0)
    """Targets, alike for every student. 0 measures students as they are before training: the baseline, and the initial
    KL to each teacher."""

    tokens_per_parameter: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Targets for each of the student's parameters, all of them counted."""

    students: tuple[str, ...] | None = None
    """The students that train so long, for an axis that only some of them need; all where it is left out."""

    alphas: tuple[float, ...] | None = None
    """Weights of the KL under this budget; the grid's `alphas` where it is left out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.alphas is not None:
            _require_alphas("budgets", self.alphas)
        if (self.tokens is None) == (self.tokens_per_parameter is None):
            found = "neither" if self.tokens is None else "both"
            raise ValueError(f"budgets: found {found} of tokens and tokens_per_parameter, expected one of them")
        return self

    def has(self, student: str) -> bool:
        """Whether a student trains so long."""
        return self.students is None or student in self.students

    def tokens_of(self, num_parameters: int) -> int:
        """Targets for a student of that size."""
        if self.tokens is not None:
            return self.tokens
        assert self.tokens_per_parameter is not None
        return max(1, round(self.tokens_per_parameter * num_parameters))


class LawReuse(Record):
    """Finished folders of earlier runs in the place of stages of the grid."""

    corpus: str | None = None
    """Folder of a corpus."""

    teachers: dict[str, str] = Field(default_factory=dict)
    """Folders of teachers, by the grid's names."""

    caches: dict[str, str] = Field(default_factory=dict)
    """Folders or URLs of caches, by the teachers' names. They must be of the grid's corpus, teacher and recording."""


class LawGrid(Record):
    """Every setting of a grid."""

    name: str
    """Name of the grid."""

    out: str = Field(json_schema_extra=OPERATIONAL)
    """Folder that receives the corpus, `teachers/`, `students/`, the table, the fit and its page."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of one seed have the same first weights and data order, whatever the teacher, so they are paired."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", json_schema_extra=OPERATIONAL)
    """Where models run. `auto` takes GPUs if there are some."""

    reuse: LawReuse = Field(default_factory=LawReuse)
    """What earlier runs have made."""

    corpus: CorpusSettings = Field(default_factory=CorpusSettings)
    """Text, tokenizer, packing and splits, for all models."""

    teachers: dict[str, TeacherSettings]
    """By a name of yours: given ones (`path`), or small ones to train (`model` and `training`)."""

    teacher_training: Annotated[dict[str, Any], PartOf(OptimizationSettings)] = Field(default_factory=dict)
    """Settings that the trainings of all teachers share; those that stand at a teacher's own `training` win."""

    cache: CacheSettings = Field(default_factory=CacheSettings)
    """How distributions are kept: one recording for all teachers, or it would look like an effect of the teacher."""

    students: dict[str, StudentSettings]
    """By a name of yours."""

    inits: tuple[Init, ...] = ("common",)
    """Where students' first weights come from, each with curves of its own. `common`: from the seed, or the student's
    `path`, whatever the teacher. `pruned`: a student of the same shape, cut out of the teacher that it then learns
    from."""

    prune: PruneSettings = Field(default_factory=PruneSettings)
    """What stays of a teacher in pruned students. Sizes are the students' shapes."""

    train: TrainSettings = Field(default_factory=TrainSettings)
    """How students are trained; `alpha` and `max_tokens` are the grid's, `alphas` and `budgets`."""

    train_of: dict[str, Annotated[dict[str, Any], PartOf(TrainSettings)]] = Field(default_factory=dict)
    """By student: the settings of `train` in which its trainings differ, for example `{learning_rate: 1.0e-3}`."""

    budgets: dict[str, Budget]
    """By a name of yours: how long students train."""

    alphas: tuple[float, ...] = (1.0,)
    """Weights of the KL to the teacher, each a curve of its own; the supervised arm comes by itself."""

    eval: EvalSettings = Field(default_factory=EvalSettings)
    """How models are measured."""

    max_hours: float | None = Field(None, gt=0, json_schema_extra=OPERATIONAL)
    """A grid that is planned to take longer is refused."""

    max_disk_gb: float | None = Field(None, gt=0, json_schema_extra=OPERATIONAL)
    """A grid that is planned to fill more disk, in 10^9 bytes, is refused."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: found {list(self.seeds)}, expected at least one, none twice, none negative")
        for setting in ("teachers", "students", "budgets"):
            if not getattr(self, setting):
                raise ValueError(f"{setting}: found none, expected at least one")
        for setting in ("teachers", "students", "budgets"):
            for name in getattr(self, setting):
                _require_word(setting, name)
        _require_word("name", self.name)
        _require_alphas("alphas", self.alphas)
        self._check_names()
        self._check_inits()
        self._check_training()
        return self

    def _check_names(self) -> None:
        named: list[tuple[str, Iterable[str], Mapping[str, object]]] = [
            ("train_of", self.train_of, self.students),
            ("reuse.teachers", self.reuse.teachers, self.teachers),
            ("reuse.caches", self.reuse.caches, self.teachers),
            *((f"budgets.{name}.students", one.students or (), self.students) for name, one in self.budgets.items()),
        ]
        for setting, names, known in named:
            for name in names:
                if name not in known:
                    raise ValueError(f"{setting}: found {name!r}, expected one of {', '.join(known)}")
        for student in self.students:
            if not any(budget.has(student) for budget in self.budgets.values()):
                raise ValueError(f"students.{student}: found no budget for it, expected at least one")

    def _check_inits(self) -> None:
        if not self.inits or len(set(self.inits)) != len(self.inits):
            raise ValueError(f"inits: found {list(self.inits)}, expected at least one of common and pruned, none twice")
        for name, student in self.students.items():
            if student.prune is not None:
                raise ValueError(f"students.{name}.prune: found in a grid, expected a model and inits: [pruned]")
            if "pruned" in self.inits and student.model is None:
                raise ValueError(f"students.{name}: found path, expected a model where inits has pruned")
        given = self.prune.model_fields_set
        for size in _SIZES:
            if size in given:
                raise ValueError(f"prune.{size}: found in a grid, expected the shapes of students")
        if given and "pruned" not in self.inits:
            raise ValueError(f"prune: found with inits {list(self.inits)}, expected it where inits has pruned")

    def _check_training(self) -> None:
        given = self.train.model_fields_set.union(*(set(values) for values in self.train_of.values()))
        for name, instead in (("alpha", "alphas"), ("max_tokens", "budgets")):
            if name in given:
                raise ValueError(f"train.{name}: found in a grid, expected {instead}")
        for student in self.students:
            settings = self.train_settings(student)
            if settings.final_alpha is not None or settings.targets != "cache" or settings.caches:
                raise ValueError(
                    "train: found final_alpha, targets online or further caches, expected in a grid one alpha, and one "
                    "teacher through its cache"
                )
        if self.cache.engine == "server":
            raise ValueError("cache.engine: found server in a grid, expected vllm or transformers")
        for teacher in self.teachers:
            if self.teacher_settings(teacher).served is not None:
                raise ValueError(f"teachers.{teacher}.served: found in a grid, expected path or model")

    def teacher_settings(self, name: str) -> TeacherSettings:
        """A teacher with what all share laid below its own training.

        Raises:
            ValueError: a shared setting is none of a training, or of the wrong kind.
        """
        teacher = self.teachers[name]
        if teacher.model is None:
            return teacher
        own = teacher.training.model_dump(exclude_unset=True) if teacher.training is not None else {}
        training = _merged(OptimizationSettings, {**self.teacher_training, **own}, ("teacher_training",))
        return teacher.model_copy(update={"training": training})

    def student_settings(self, student: str, init: Init) -> StudentSettings:
        """Where a student's first weights come from: of a pruned one its shape, as sizes to prune to."""
        if init == "common":
            return self.students[student]
        shape = self.students[student].model
        assert shape is not None
        sizes = {name: getattr(shape, name) for name in _SIZES}
        sizes["num_key_value_heads"] = shape.num_key_value_heads or shape.num_heads
        return StudentSettings(prune=PruneSettings(**{**self.prune.model_dump(exclude_unset=True), **sizes}))

    def train_settings(self, student: str) -> TrainSettings:
        """The settings of `train` with the student's own in their place.

        Raises:
            ValueError: a setting is none of a training, or of the wrong kind.
        """
        own = {**self.train.model_dump(exclude_unset=True), **self.train_of.get(student, {})}
        return _merged(TrainSettings, own, ("train_of", student))


def _require_alphas(setting: str, alphas: tuple[float, ...]) -> None:
    if not alphas or len(set(alphas)) != len(alphas) or not all(0 < alpha <= 1 for alpha in alphas):
        raise ValueError(
            f"{setting}: found {list(alphas)}, expected numbers above 0, at most 1, none twice; the supervised arm "
            "comes by itself"
        )


def _merged(record: type[_R], values: dict[str, Any], where: tuple[str, ...]) -> _R:
    try:
        return record.model_validate(values)
    except ValidationError as error:
        raise below(error, *where) from None


def _require_word(setting: str, name: str) -> None:
    """Names become folders and parts of arms' names."""
    if not name or name.startswith(".") or any(not (c.isalnum() or c in "-_.") for c in name) or name == SUPERVISED:
        raise ValueError(
            f"{setting}: found the name {name!r}, expected letters, digits, '-', '_' and '.', and not {SUPERVISED!r}"
        )
