"""The stages of a run file: their instances, what each reads, and the settings that decide each result."""

from __future__ import annotations

from typing import Any

from capgap.pipeline.answers.questions import own_questions_digest
from capgap.pipeline.judge.prompts import prompts_digest
from capgap.pipeline.stage.context import CHAT_CACHE, STAGES, Instance, StageName, further_cache
from capgap.schemas.errors import SettingError
from capgap.schemas.results import TEACHER
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_tune import OWN_CACHE

# Stages that make the weights of an arm, each from those before it.
_MAKERS = ("train", "tune")


def instances(run: RunFile) -> list[Instance]:
    """Every instance of every stage that is not reused from another run, inputs before what reads them.

    A teacher that nothing reads, because a cache is reused and stands for it, is none of them.
    """
    unused = (
        ()
        if any("teacher" in input_names(run, i) for i in _all_instances(run) if i.stage not in run.reuse)
        else ("teacher",)
    )
    return [instance for instance in _all_instances(run) if instance.stage not in (*run.reuse, *unused)]


def select(run: RunFile, pattern: str) -> list[Instance]:
    """The instances named by a stage (`train`), a stage and an arm (`train/distilled`), or in full.

    Raises:
        SettingError: nothing is named so.
    """
    known = instances(run)
    found = [i for i in known if i.name == pattern or i.name.startswith(pattern + "/")]
    if not found:
        names = sorted({i.stage for i in known}, key=STAGES.index)
        reused = f" ({pattern} is reused from {run.reuse[pattern]})" if pattern in run.reuse else ""
        raise SettingError("no such stage", found=pattern + reused, expected=f"one of {', '.join(names)}")
    return found


def downstream(run: RunFile, pattern: str) -> list[Instance]:
    """The instances that `pattern` names and all that depend on them."""
    chosen = {i.name for i in select(run, pattern)}
    for instance in instances(run):
        if any(name in chosen for name in input_names(run, instance)):
            chosen.add(instance.name)
    return [i for i in instances(run) if i.name in chosen]


def input_names(run: RunFile, instance: Instance) -> list[str]:
    """Names of the instances that this one reads."""
    seed = instance.seed
    students = [i.name for i in _all_instances(run) if i.stage == "student"]
    trained = [i.name for i in _all_instances(run) if i.stage == "train"]
    measured = [i.name for i in _benchmarks(run)]
    answers = [i.name for i in _all_instances(run) if i.stage == "answers"]
    judged = ["judge"] if run.judge is not None else []
    by_stage: dict[StageName, list[str]] = {
        "corpus": [],
        "teacher": ["corpus"],
        "cache": ["corpus", "teacher"],
        "student": ["corpus", *_pruned_teacher(run)],
        "train": ["corpus", *_online_teacher(run, instance), "cache", Instance("student", seed=seed).name],
        "tune": _tuned(run, instance) if instance.stage == "tune" else [],
        "eval": ["corpus", *_measured_teacher(run), "cache", *trained],
        "benchmark": _measured_or_asked(run, instance),
        "answers": _measured_or_asked(run, instance),
        "judge": answers,
        "report": ["corpus", *_measured_teacher(run), "cache", *students, *trained, "eval", *measured, *judged],
    }
    return by_stage[instance.stage]


def implied_inputs(instance: Instance) -> frozenset[str]:
    """Inputs that the identities of others already hold, so that the instance's own identity does without them.

    Students hold that of their cache; and what was evaluated before caches were read there stays current.
    """
    return frozenset({"cache"} if instance.stage == "eval" else ())


def further_caches(run: RunFile, instance: Instance) -> dict[str, str]:
    """Finished caches of other runs that a training or tuning reads: folder or URL, by the name of the input."""
    if instance.stage == "tune" and run.tune is not None and run.tune.cache not in (None, OWN_CACHE):
        return {CHAT_CACHE: str(run.tune.cache)}
    if instance.stage != "train":
        return {}
    assert instance.arm is not None
    caches = run.train_settings(instance.arm).caches
    return {further_cache(name): cache.path for name, cache in caches.items() if cache.path is not None}


def decisive_settings(run: RunFile, instance: Instance) -> dict[str, Any]:
    """The settings that decide what the instance makes; two instances with equal ones and equal inputs are one."""
    match instance.stage:
        case "corpus":
            return {"corpus": run.corpus.decisive()}
        case "teacher":
            return {"teacher": run.teacher.decisive()}
        case "cache":
            return {"cache": run.cache.decisive()}
        case "student":
            return {"student": run.student.decisive(), "seed": instance.seed}
        case "train":
            assert instance.arm is not None
            return {"train": run.train_settings(instance.arm).decisive(), "arm": instance.arm, "seed": instance.seed}
        case "tune":
            assert run.tune is not None
            return {"tune": run.tune.decisive(), "arm": instance.arm, "seed": instance.seed}
        case "eval":
            return {"eval": run.eval.decisive()}
        case "benchmark":
            assert run.benchmarks is not None
            return {"benchmarks": run.benchmarks.decisive()}
        case "answers":
            assert run.judge is not None
            own = {"own_questions": own_questions_digest()} if run.judge.questions is None else {}
            return {"judge": run.judge.decisive_for_answers(), **own}
        case "judge":
            assert run.judge is not None
            return {"judge": run.judge.decisive_for_verdicts(), "prompts": prompts_digest()}
        case "report":
            return {"name": run.name, "arms": sorted(run.arms)}


def _online_teacher(run: RunFile, instance: Instance) -> list[str]:
    """The teacher, where the arm asks it rather than the cache."""
    asked = instance.stage == "train" and instance.arm is not None and run.train_settings(instance.arm).needs_teacher
    return ["teacher"] if asked else []


def _pruned_teacher(run: RunFile) -> list[str]:
    """The teacher, where the student is what pruning leaves of it."""
    return [] if run.student.prune is None else ["teacher"]


def _measured_teacher(run: RunFile) -> list[str]:
    """The teacher, unless the cache alone stands for it."""
    return [] if run.eval.teacher == "cache" else ["teacher"]


def _tuned(run: RunFile, instance: Instance) -> list[str]:
    """The student that is tuned, where no model is given, and the run's own cache, where that is learnt from."""
    assert run.tune is not None
    students = [] if run.tune.path is not None else [Instance("train", arm=instance.arm, seed=instance.seed).name]
    return [*students, *(["cache"] if run.tune.cache == OWN_CACHE else [])]


def _tune_instances(run: RunFile) -> list[Instance]:
    if run.tune is None:
        return []
    # a given model is the same in every arm
    arms = [None] if run.tune.path is not None else list(run.arms)
    return [Instance("tune", arm=arm, seed=seed) for seed in run.seeds for arm in arms]


def _all_instances(run: RunFile) -> list[Instance]:
    return [*_before_answers(run), *_benchmarks(run), *_judging(run), Instance("report")]


def _before_answers(run: RunFile) -> list[Instance]:
    return [
        Instance("corpus"),
        Instance("teacher"),
        Instance("cache"),
        *(Instance("student", seed=seed) for seed in run.seeds),
        *(Instance("train", arm=arm, seed=seed) for seed in run.seeds for arm in run.arms),
        *_tune_instances(run),
        Instance("eval"),
    ]


def _final_models(run: RunFile) -> list[Instance]:
    """What makes the students that a run ends with: of the stages that make their weights, the last."""
    makers = [instance for instance in _before_answers(run) if instance.stage in _MAKERS]
    last = max(makers, key=lambda instance: _MAKERS.index(instance.stage)).stage
    return [instance for instance in makers if instance.stage == last]


def _benchmarks(run: RunFile) -> list[Instance]:
    """One for each model: vLLM gives a device's memory back only when its process ends."""
    if run.benchmarks is None:
        return []
    teacher = [Instance("benchmark", arm=TEACHER)] if run.benchmarks.teacher else []
    return [*teacher, *(Instance("benchmark", arm=model.arm, seed=model.seed) for model in _final_models(run))]


def _judging(run: RunFile) -> list[Instance]:
    """What a judge needs: answers of every model, each in a process of its own, and its verdicts."""
    if run.judge is None:
        return []
    teacher = [Instance("answers", arm=TEACHER)] if run.judge.teacher else []
    students = [Instance("answers", arm=model.arm, seed=model.seed) for model in _final_models(run)]
    return [*teacher, *students, Instance("judge")]


def _measured_or_asked(run: RunFile, instance: Instance) -> list[str]:
    """What made the model that is measured on tasks, or answers."""
    if instance.seed is None:
        return ["teacher"]
    of = (instance.arm, instance.seed)
    return [model.name for model in _final_models(run) if (model.arm, model.seed) == of]
