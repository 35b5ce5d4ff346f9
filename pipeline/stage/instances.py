"""The instances that several stages refer to: students, trainings, tunings, and the models that a run ends with."""

from __future__ import annotations

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.rounds import cache_of, last_trainings, round_trainings, shared_cache, texts
from capgap.schemas.results import TEACHER
from capgap.schemas.run_file import RunFile


def once(stage: str, section: str, run: RunFile) -> list[Instance]:
    """Return the single instance of a stage, or none where the run does not make the stage."""
    return [Instance(stage)] if run.makes(section) else []


def students(run: RunFile) -> list[Instance]:
    """Return the instances that make first weights, one for each seed."""
    return [Instance("student", seed=seed) for seed in run.seeds] if run.makes("student") else []


def trainings(run: RunFile) -> list[Instance]:
    """Return the trainings: one for each arm and seed, and in a run with rounds for each round."""
    if not run.makes("train"):
        return []
    if run.rounds is not None:
        return round_trainings(run)
    return [Instance("train", arm=arm, seed=seed) for seed in run.seeds for arm in run.arms]


def final_trainings(run: RunFile) -> list[Instance]:
    """Return the trainings of the students that the run ends with: in a run with rounds, those of the last round."""
    return last_trainings(run) if run.rounds is not None and run.makes("train") else trainings(run)


def caches(run: RunFile) -> list[Instance]:
    """Return the cache of a run, or in a run with rounds one cache for each text."""
    if run.rounds is not None:
        return [cache_of(text) for text in texts(run)] if run.makes("cache") else []
    return once("cache", "cache", run)


def tunings(run: RunFile) -> list[Instance]:
    """Return the tunings: one for each trained student, or one for each seed where every arm tunes the same model."""
    if run.tune is None:
        return []
    arms = [None] if run.tune.path is not None else list(run.arms)
    return [Instance("tune", arm=arm, seed=seed) for seed in run.seeds for arm in arms]


def final_models(run: RunFile) -> list[Instance]:
    """Return the instances that make the final students: the tunings, or the trainings where nothing is tuned."""
    return tunings(run) or final_trainings(run)


def measured_models(run: RunFile, stage: str, with_teacher: bool) -> list[Instance]:
    """Return one instance of a stage for each final model, and one for the teacher, with the teacher's name as its arm.

    Each model needs a process of its own, because vLLM frees the device's memory only when its process ends.
    """
    teacher = [Instance(stage, arm=TEACHER)] if with_teacher else []
    return [*teacher, *(Instance(stage, arm=model.arm, seed=model.seed) for model in final_models(run))]


def maker_of(run: RunFile, instance: Instance) -> str:
    """Return the name of the instance that made the model of an instance of `measured_models`."""
    if instance.seed is None:
        return TEACHER
    looked_at = (instance.arm, instance.seed)
    return next(model.name for model in final_models(run) if (model.arm, model.seed) == looked_at)


def usual_roles(run: RunFile, instance: Instance) -> dict[str, str]:
    """Return the roles of a run's final trainings and of its shared cache in later stages, where it has rounds."""
    if run.rounds is None:
        return {}
    final = {one.name: Instance("train", one.arm, one.seed).name for one in last_trainings(run)}
    return final | {shared_cache(run).name: "cache"}


def names(instances: list[Instance]) -> list[str]:
    """Return the names of the instances."""
    return [instance.name for instance in instances]


def text_inputs(run: RunFile) -> list[str]:
    """Return the input with the students' tokenizer, context rule and held-out text: the corpus, or else the cache."""
    return corpus_inputs(run) or cache_inputs(run)


def cache_inputs(run: RunFile) -> list[str]:
    """Return the cache that students learn from, which is the aligned one where the run has `align`.

    In a run with rounds it is the cache on which all students are measured alike.
    """
    if run.rounds is not None:
        return [shared_cache(run).name]
    return ["align"] if run.makes("align") else ["cache"] if run.has("cache") else []


def corpus_inputs(run: RunFile) -> list[str]:
    """Return the corpus, where the run has one in the students' own tokens."""
    return ["corpus"] if run.has("corpus") and not run.makes("align") else []


def teacher_inputs(run: RunFile) -> list[str]:
    """Return the teacher, where `eval` measures it."""
    return [TEACHER] if run.measures_teacher else []
