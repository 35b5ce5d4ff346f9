"""The grid file: teachers x students x inits x token budgets x alphas x seeds, as one YAML file.

    grid file --pipeline/law/expand--> run files: one for the corpus, one per teacher, one per student x teacher x seed

Every grid contains the supervised arm (alpha 0, no teacher) for each student, budget and seed; for pruned students,
whose initial weights depend on the teacher, also for each teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from capgap.schemas.base import OPERATIONAL, PartOf, Record, below
from capgap.schemas.home import PATH
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
"""The name that takes the place of a teacher's, in folders and in names of arms, for runs without a teacher."""

# The sizes that both a student's shape and `prune` have.
_SIZES = ("num_layers", "hidden_size", "num_heads", "num_key_value_heads", "intermediate_size")


class Budget(Record):
    """How long students train, by one rule for all of them: `tokens` or `tokens_per_parameter`."""

    tokens: int | None = Field(None, ge=0)
    """Number of targets, the same for every student. 0 measures the untrained students: a baseline, and the initial KL
    to each teacher."""

    tokens_per_parameter: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Number of targets per parameter of the student, counting all its parameters."""

    students: tuple[str, ...] | None = None
    """Names of the students that train with this budget. Left out, all."""

    alphas: tuple[float, ...] | None = None
    """Weights of the KL with this budget. Left out, the grid's `alphas`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.alphas is not None:
            _require_alphas("budgets", self.alphas)
        if (self.tokens is None) == (self.tokens_per_parameter is None):
            found = "neither" if self.tokens is None else "both"
            raise ValueError(f"budgets: found {found} of tokens and tokens_per_parameter, expected one of them")
        return self

    def has(self, student: str) -> bool:
        """Return whether a student trains with this budget."""
        return self.students is None or student in self.students

    def tokens_of(self, num_parameters: int) -> int:
        """Return the number of targets for a student of this size."""
        if self.tokens is not None:
            return self.tokens
        assert self.tokens_per_parameter is not None
        return max(1, round(self.tokens_per_parameter * num_parameters))


class LawReuse(Record):
    """Finished stage folders of earlier runs, used in place of the grid's own stages."""

    corpus: Annotated[str | None, PATH] = None
    """Folder of a finished corpus."""

    teachers: Annotated[dict[str, str], PATH] = Field(default_factory=dict)
    """Folders of finished teachers, by the grid's names of the teachers."""

    caches: Annotated[dict[str, str], PATH] = Field(default_factory=dict)
    """Folders or URLs of finished caches, by the grid's names of the teachers. A cache must have the grid's corpus,
    teacher and recording."""


class LawGrid(Record):
    """Every setting of a grid."""

    name: str
    """Name of the grid."""

    out: Annotated[str, PATH] = Field(json_schema_extra=OPERATIONAL)
    """Folder for the results. It receives the corpus, `teachers/`, `students/`, the table, the fit and its page."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs. All runs of one seed have the same initial weights and data order, whatever the teacher, so
    that they can be compared in pairs. More seeds make smaller differences visible."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", json_schema_extra=OPERATIONAL)
    """Where models run. `auto` takes GPUs if there are any."""

    reuse: LawReuse = Field(default_factory=LawReuse)
    """Finished results of earlier runs to use."""

    corpus: CorpusSettings = Field(default_factory=CorpusSettings)
    """Text, tokenizer, packing and splits, for all models."""

    teachers: dict[str, TeacherSettings]
    """Teachers by a name of your choice. Each is given (`path`), or a small one to train (`model` and `training`)."""

    teacher_training: Annotated[dict[str, Any], PartOf(OptimizationSettings)] = Field(default_factory=dict)
    """Settings that the trainings of all teachers share. Settings in a teacher's own `training` override them."""

    cache: CacheSettings = Field(default_factory=CacheSettings)
    """How distributions are stored, alike for all teachers, so that its effect is not mistaken for a teacher's."""

    students: dict[str, StudentSettings]
    """Students by a name of your choice, each with `model` or `path`."""

    inits: tuple[Init, ...] = ("common",)
    """Where students' initial weights come from. Each kind has its own curves. `common`: from the seed or the student's
    `path`, whatever the teacher. `pruned`: pruned, to the student's shape, from the teacher that the student then
    learns from."""

    prune: PruneSettings = Field(default_factory=PruneSettings)
    """How teachers are pruned for `inits: [pruned]`. The sizes are those of the students' shapes."""

    train: TrainSettings = Field(default_factory=TrainSettings)
    """How students are trained. `alphas` and `budgets` take the place of `alpha` and `max_tokens`."""

    train_of: dict[str, Annotated[dict[str, Any], PartOf(TrainSettings)]] = Field(default_factory=dict)
    """Settings of `train` that differ for single students, by student, for example `{learning_rate: 1.0e-3}`."""

    budgets: dict[str, Budget]
    """Budgets by a name of your choice: how long students train."""

    alphas: tuple[float, ...] = (1.0,)
    """Weights of the KL to the teacher, each with its own curves. The supervised arm is always added."""

    eval: EvalSettings = Field(default_factory=EvalSettings)
    """How models are measured."""

    max_hours: float | None = Field(None, gt=0, json_schema_extra=OPERATIONAL)
    """Refuse to run a grid that is planned to take more hours than this."""

    max_disk_gb: float | None = Field(None, gt=0, json_schema_extra=OPERATIONAL)
    """Refuse to run a grid that is planned to fill more GB of disk than this. 1 GB is 10^9 bytes."""

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
        """Return a teacher's settings, with `teacher_training` as defaults of its own training.

        Raises:
            ValueError: `teacher_training` has a setting that a training does not have, or a value of the wrong type.
        """
        teacher = self.teachers[name]
        if teacher.model is None:
            return teacher
        own = teacher.training.model_dump(exclude_unset=True) if teacher.training is not None else {}
        training = _merged(OptimizationSettings, {**self.teacher_training, **own}, ("teacher_training",))
        return teacher.model_copy(update={"training": training})

    def student_settings(self, student: str, init: Init) -> StudentSettings:
        """Return a student's settings; for the init `pruned`, `prune` with the sizes of the student's shape."""
        if init == "common":
            return self.students[student]
        shape = self.students[student].model
        assert shape is not None
        sizes = {name: getattr(shape, name) for name in _SIZES}
        sizes["num_key_value_heads"] = shape.num_key_value_heads or shape.num_heads
        return StudentSettings(prune=PruneSettings(**{**self.prune.model_dump(exclude_unset=True), **sizes}))

    def train_settings(self, student: str) -> TrainSettings:
        """Return the settings of `train` for one student, with its own values of `train_of` over the shared ones.

        Raises:
            ValueError: `train_of` has a setting that `train` does not have, or a value of the wrong type.
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
    """Raise ValueError unless a name can be the name of a folder and a part of an arm's name."""
    if not name or name.startswith(".") or any(not (c.isalnum() or c in "-_.") for c in name) or name == SUPERVISED:
        raise ValueError(
            f"{setting}: found the name {name!r}, expected letters, digits, '-', '_' and '.', and not {SUPERVISED!r}"
        )
