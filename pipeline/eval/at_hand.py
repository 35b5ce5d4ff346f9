"""Decide whether an evaluation measures the teacher itself, or only uses its cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from capgap.pipeline.models.configs import load_config
from capgap.pipeline.models.load import model_path
from capgap.pipeline.stage.context import StageContext, StageInput
from capgap.pipeline.train.fits import free_bytes
from capgap.schemas.errors import InputError, MachineError, SettingError
from capgap.schemas.facts import ModelFacts
from capgap.schemas.results import TEACHER
from capgap.schemas.run_eval import EvalSettings

NO_TEACHER = "the run has none: a finished cache stands for it"
OTHER_TOKENS = "its tokenizer differs from the students', so that there is no KL by token: chunks of text stand for it"
SERVED_TEACHER = "it is served elsewhere: its cache stands for it"


def require_teacher_if_wanted(settings: EvalSettings, inputs: Mapping[str, StageInput]) -> None:
    """Refuse settings that need the teacher itself in a run that has none.

    Raises:
        SettingError: The settings ask to measure the teacher, or to let students draft for it.
    """
    if TEACHER in inputs or (settings.teacher != "live" and settings.speculative is None):
        return
    drafts = settings.speculative is not None
    raise SettingError(
        "students are to draft for the teacher, and this run has none"
        if drafts
        else "the teacher itself is to be measured, and this run has none",
        where="eval.speculative" if drafts else "eval.teacher",
        found="set" if drafts else "live",
        expected="nothing that needs the teacher, where a finished cache stands for it",
        fix="leave it out, or name teacher and corpus in the run file",
    )


def why_missing(context: StageContext) -> str | None:
    """Return why the teacher itself is not measured, in words; None where it is measured.

    A run without a teacher does not measure it: a finished cache stands for it. Under `auto` it is not measured where
    its model cannot be found, or its weights exceed the device's free memory. Under `live`, and where students draft
    for it, it is always measured: whatever is wrong with it is raised when it is loaded.
    """
    settings = context.run.eval
    if settings.teacher == "cache":
        return "eval.teacher is cache"
    if TEACHER not in context.inputs:
        if context.input("cache").manifest.facts.get("aligned") is not None:
            return OTHER_TOKENS
        return SERVED_TEACHER if context.run.teacher.served is not None else NO_TEACHER
    if settings.teacher == "live" or settings.speculative is not None:
        return None
    path = model_path(context.input(TEACHER))
    try:
        config = load_config(path, context.run.teacher.trust_remote_code)
    except (InputError, MachineError) as error:
        return f"its model cannot be found: {error}"
    if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        return f"its model cannot be found: no weights as safetensors in {path}"
    facts = ModelFacts.model_validate(context.input(TEACHER).manifest.facts)
    needed, free = facts.num_parameters * _bytes_a_parameter(config), free_bytes(context.device)
    if needed > free:
        return f"its weights take {needed / 2**30:.3g} GiB, and {context.device} has {free / 2**30:.3g} GiB free"
    return None


def _bytes_a_parameter(config: object) -> int:
    """Return the bytes of a weight in the configuration's dtype, which is float32 where it names none."""
    dtype = getattr(config, "dtype", None)
    return 4 if dtype is None else int(dtype.itemsize)
