"""The student stage: makes the model with which the training begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from capgap.pipeline.models.checks import check_given_model, fresh_model
from capgap.pipeline.models.load import load_model, model_facts, model_path
from capgap.pipeline.models.text import RunText
from capgap.pipeline.models.tokenizers import load_tokenizer, with_names_of
from capgap.pipeline.models.trainable import save_trained
from capgap.pipeline.stage.context import Instance, StageContext, StageInput, StageResult
from capgap.pipeline.student.prune import prune, require_prunable
from capgap.pipeline.student.quantise import quantise, require_quantisable
from capgap.pipeline.train.heads import served_head
from capgap.schemas.errors import SettingError
from capgap.schemas.run_file import RunFile


def check(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
    """Refuse a shape to which the teacher cannot be pruned, an unsupported format, or a missing teacher.

    Raises:
        InputError, SettingError: `require_prunable` or `require_quantisable` refuses the settings, or a student is to
            be pruned and the run has no teacher or corpus.
        MachineError: The package compressed-tensors is not installed.
    """
    if run.student.prune is not None:
        for name in ("teacher", "corpus"):
            _require_there(name, inputs)
        require_prunable(run.student.prune, inputs["teacher"])
    require_quantisable(run, inputs)


def run(context: StageContext) -> StageResult:
    """Write the folder `model` with the student's first weights.

    For a student that is pruned from the teacher, `prune.json` is written beside it. For a quantised student, `model`
    has the rounded weights before any training, and `high_precision` beside it has the weights they are rounded from.

    Raises:
        InputError, MismatchError: `check_given_model` or `served_head` refuses a given model.
        InputError, SettingError, MachineError: `prune` or `quantise` fails.
    """
    settings, text = context.run.student, RunText.among(context.inputs)
    of_text = tokenizer = text.tokenizer()
    totals: dict[str, Any] = {}
    if settings.model is not None:
        assert context.instance.seed is not None
        model = fresh_model(settings.model, text.made, context.instance.seed)
    elif settings.prune is not None:
        teacher = model_path(context.input("teacher"))
        tokenizer = with_names_of(of_text, load_tokenizer(teacher, context.run.teacher.trust_remote_code))
        model, totals = prune(context, settings.prune)
    else:
        assert settings.path is not None
        path, facts = check_given_model(settings.path, text.made, "student.path", settings.trust_remote_code)
        model = load_model(path, "cpu", None, settings.trust_remote_code, to_compute=False)
        served_head(model, facts.tokenizer.vocab_size)  # refuse an unsupported head here, before the first training
        tokenizer = with_names_of(of_text, load_tokenizer(path, settings.trust_remote_code))
    if settings.quantize is not None:
        quantise(context, model, settings.quantize)
    save_trained(model, tokenizer, context.folder, settings.quantize is not None)
    # Ids of the student's own tokenizer that the text's tokenizer lacks are padding for every later stage.
    facts = model_facts(model, of_text)
    return StageResult(
        facts=facts.model_dump(mode="json"),
        totals={
            "num_parameters": facts.num_parameters,
            "num_non_embedding_parameters": facts.num_non_embedding_parameters,
            **totals,
        },
    )


def _require_there(name: str, inputs: Mapping[str, StageInput]) -> None:
    if name not in inputs:
        raise SettingError(
            f"a student that is pruned from the teacher needs the {name}, and this run has none",
            where="student.prune",
            found="a finished cache alone",
            expected=f"a section {name}, or reuse.{name}",
            fix="name teacher and corpus in the run file, or give the student as model or path",
        )
