"""Checks of given models and tokenizers that are possible before any stage of a run begins.

run file --> the text: a reused one, or one of a given tokenizer --> does each given model fit the text?
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from capgap.pipeline.models.given import TOKENIZER_FILES, require_findable
from capgap.pipeline.stage.context import StageInput
from capgap.pipeline.stage.manifests import finished_stage
from capgap.pipeline.stage.ranks import require_shares
from capgap.pipeline.stage.steps import require_a_step, seq_len_of
from capgap.schemas.run_file import RunFile

if TYPE_CHECKING:
    from capgap.pipeline.models.checks import Expected


def require_text(run: RunFile) -> None:
    """Refuse a tokenizer of the corpus that cannot be read.

    Raises:
        InputError, MachineError: the tokenizer cannot be found or loaded.
    """
    tokenizer = run.corpus.tokenizer
    if tokenizer is not None:
        require_findable(tokenizer, "corpus.tokenizer", TOKENIZER_FILES)
        from capgap.pipeline.models.checks import named
        from capgap.pipeline.models.tokenizers import load_tokenizer

        with named(f"corpus.tokenizer: {tokenizer}"):
            load_tokenizer(tokenizer)


def require_teacher(run: RunFile) -> None:
    """Refuse a given teacher that cannot be found, is incomplete, or does not fit the text that it has to score.

    A training of the teacher is refused if it ends before its first step, or if its batch does not divide among the
    devices.
    """
    if (recipe := run.teacher.optimization) is not None:
        setting = "teacher.adapt" if run.teacher.path else "teacher.training"
        require_shares(recipe, recipe.num_devices, setting)
        seq_len = seq_len_of(run, ("corpus", "cache"))
        require_a_step(recipe.max_tokens, recipe.batch_sequences, seq_len, f"{setting}.max_tokens")
    if run.teacher.path is None:
        return
    adapted, is_served = run.teacher.adapt is not None, run.teacher.served is not None
    _require_model(run, run.teacher.path, "teacher.path", run.teacher.trust_remote_code, adapted, is_served)
    if adapted:
        from capgap.pipeline.models.configs import load_config
        from capgap.pipeline.models.trainable import require_plain

        setting = f"teacher.path, which teacher.adapt trains: {run.teacher.path}"
        require_plain(load_config(run.teacher.path, run.teacher.trust_remote_code), setting)


def require_student(run: RunFile) -> None:
    """Refuse a given student that cannot be found, is incomplete, or does not fit the text that it has to learn."""
    if run.student.path is not None:
        _require_model(run, run.student.path, "student.path", run.student.trust_remote_code)


def _require_model(
    run: RunFile, path: str, setting: str, trusted: bool, adapted: bool = False, is_served: bool = False
) -> None:
    require_findable(path, setting)
    from capgap.pipeline.models.checks import check_model

    check_model(path, setting, trusted, replace(_expected(run, adapted), is_served=is_served))


def _expected(run: RunFile, adapted: bool) -> Expected:
    """Return what is known about the text that the models have to fit, before it is made."""
    from capgap.pipeline.models.checks import Expected
    from capgap.pipeline.models.text import RunText
    from capgap.pipeline.models.tokenizers import load_tokenizer

    for stage in ("corpus", "cache"):
        if stage in run.reuse and not run.makes("corpus"):
            folder = run.reuse[stage]
            made = StageInput(*finished_stage(stage, folder, "cannot be reused", f"reuse.{stage}: {folder}", "a stage"))
            text = RunText(made)
            return Expected(text.tokenizer(), f"the {stage}", text.seq_len, adapted)
    given = run.corpus.tokenizer
    # the pieces that extend a tokenizer are known only when the corpus is made
    is_known = given is not None and run.corpus.extend_vocabulary is None
    return Expected(load_tokenizer(given) if is_known and given else None, "the corpus", run.corpus.seq_len, adapted)
