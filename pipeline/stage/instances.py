"""The instances that several stages speak of: students, trainings, tunings, and the models that a run ends with."""

from __future__ import annotations

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.rounds import cache_of, last_trainings, round_trainings, shared_cache, texts
from capgap.schemas.results import TEACHER
from capgap.schemas.run_file import RunFile


def once(stage: str, section: str, run: RunFile) -> list[Instance]:
    """The one instance of a stage, where the run makes it."""
    return [Instance(stage)] if run.makes(section) else []


def students(run: RunFile) -> list[Instance]:
    """First weights, once a seed."""
    return [Instance("student", seed=seed) for seed in run.seeds] if run.makes("student") else []


def trainings(run: RunFile) -> list[Instance]:
    """One for each arm and seed, and round."""
    if not run.makes("train"):
        return []
    if run.rounds is not None:
        return round_trainings(run)
    return [Instance("train", arm=arm, seed=seed) for seed in run.seeds for arm in run.arms]


def final_trainings(run: RunFile) -> list[Instance]:
    """Those whose students the run ends with: where it has rounds, of the last one."""
    return last_trainings(run) if run.rounds is not None and run.makes("train") else trainings(run)


def caches(run: RunFile) -> list[Instance]:
    """The one cache of a run, or in a run with rounds one for each text."""
    if run.rounds is not None:
        return [cache_of(text) for text in texts(run)] if run.makes("cache") else []
    return once("cache", "cache", run)


def tunings(run: RunFile) -> list[Instance]:
    """One for each trained student; of a given model, which is the same in every arm, one a seed."""
    if run.tune is None:
        return []
    arms = [None] if run.tune.path is not None else list(run.arms)
    return [Instance("tune", arm=arm, seed=seed) for seed in run.seeds for arm in arms]


def final_models(run: RunFile) -> list[Instance]:
    """What makes the students that the run ends with: of the stages that make their weights, the last."""
    return tunings(run) or final_trainings(run)


def measured_models(run: RunFile, stage: str, with_teacher: bool) -> list[Instance]:
    """An instance of a stage for each final model, and one for the teacher, whose arm is called so.

    vLLM gives a device's memory back only when its process ends, so that each model needs a process of its own.
    """
    teacher = [Instance(stage, arm=TEACHER)] if with_teacher else []
    return [*teacher, *(Instance(stage, arm=model.arm, seed=model.seed) for model in final_models(run))]


def maker_of(run: RunFile, instance: Instance) -> str:
    """The name of what made the model that an instance of `measured_models` looks at."""
    if instance.seed is None:
        return TEACHER
    looked_at = (instance.arm, instance.seed)
    return next(model.name for model in final_models(run) if (model.arm, model.seed) == looked_at)


def usual_roles(run: RunFile, instance: Instance) -> dict[str, str]:
    """In a run with rounds, the roles that its final trainings and the cache for all have in stages that follow."""
    if run.rounds is None:
        return {}
    final = {one.name: Instance("train", one.arm, one.seed).name for one in last_trainings(run)}
    return final | {shared_cache(run).name: "cache"}


def names(instances: list[Instance]) -> list[str]:
    """Their names."""
    return [instance.name for instance in instances]


def text_inputs(run: RunFile) -> list[str]:
    """What carries students' tokenizer, context rule and held-out text: the corpus, or else their cache."""
    return corpus_inputs(run) or cache_inputs(run)


def cache_inputs(run: RunFile) -> list[str]:
    """The cache that students learn from: what `align` makes of the run's, where it does.

    Of the caches of several rounds it is the one on which all students are measured alike.
    """
    if run.rounds is not None:
        return [shared_cache(run).name]
    return ["align"] if run.makes("align") else ["cache"] if run.has("cache") else []


def corpus_inputs(run: RunFile) -> list[str]:
    """The corpus, where the run has one in the students' own tokens."""
    return ["corpus"] if run.has("corpus") and not run.makes("align") else []


def teacher_inputs(run: RunFile) -> list[str]:
    """The teacher, where `eval` measures it."""
    return [TEACHER] if run.measures_teacher else []
