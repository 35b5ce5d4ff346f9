"""A check that a training is long enough for one step, before anything that it needs is made."""

from __future__ import annotations

from collections.abc import Iterable

from capgap.pipeline.stage.manifests import finished_stage
from capgap.schemas.errors import SettingError
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_sections import ReusableStage


def require_a_step(max_tokens: int | None, batch_sequences: int, seq_len: int, where: str) -> None:
    """Refuse a training that would stop before its first step.

    Args:
        max_tokens: Number of tokens after which the training stops; 0 or None for no such training.
        batch_sequences: Number of sequences of a step.
        seq_len: Number of targets of a sequence.
        where: Name of the setting, for errors.

    Raises:
        SettingError: `max_tokens` is lower than the number of targets of one step.
    """
    step = batch_sequences * seq_len
    if max_tokens and max_tokens < step:
        raise SettingError(
            "fewer tokens than one step of training",
            where=where,
            found=max_tokens,
            expected=f"at least {step}, the targets of {batch_sequences} sequences of {seq_len}",
            fix="raise it, or lower batch_sequences or corpus.seq_len",
        )


def seq_len_of(run: RunFile, stages: Iterable[ReusableStage]) -> int:
    """Return the number of targets of a sequence, in the first of `stages` that the run reuses, or else in its corpus.

    Raises:
        InputError: A folder under `reuse` does not hold that finished stage.
    """
    for stage in stages:
        if stage in run.reuse:
            folder = run.reuse[stage]
            where, expected = f"reuse.{stage}: {folder}", f"the folder of a finished {stage} stage"
            _, manifest = finished_stage(stage, folder, "cannot be reused", where, expected)
            return next(iter(manifest.shard_sets.values())).seq_len
    return run.corpus.seq_len
