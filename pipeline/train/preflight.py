"""Checks a run's trainings before any stage of the run begins."""

from __future__ import annotations

from capgap.pipeline.stage.manifests import finished_stage
from capgap.pipeline.stage.ranks import require_shares
from capgap.pipeline.stage.steps import require_a_step, seq_len_of
from capgap.schemas.facts import CacheFacts
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_train import TrainSettings

# the loggers whose packages are dependencies of capgap
_ALWAYS_THERE = ("tensorboard", "csv")


def require_trainable(run: RunFile) -> None:
    """Refuse arms that cannot be trained, and loggers that do not exist.

    An arm is refused if a reused cache does not support it, if it ends before its first step, or if its steps cannot be
    divided among the devices.

    Raises:
        SettingError: A reused cache lacks a recording or a temperature, an arm has less than one step, the sequences of
            a step cannot be divided among the devices, or a logger does not exist.
        MismatchError: A reused cache does not support an arm's loss.
        InputError: A logger's package is not installed, or there is no finished cache at the place of a reused one.
    """
    facts = _reused_facts(run)
    for arm in run.arms:
        settings = run.train_settings(arm)
        _require_loggers(settings)
        require_shares(settings, settings.num_devices, "train")
        # The steps of a mix and the sequences that align makes are not known yet; the stages check them.
        if not settings.caches and not run.makes("align"):
            seq_len = seq_len_of(run, ("cache", "corpus"))
            require_a_step(settings.max_tokens, settings.batch_sequences, seq_len, f"train.max_tokens of arm {arm}")
        if facts is not None:
            # imported here because they import torch
            from capgap.pipeline.train.caches import choose
            from capgap.pipeline.train.objective import objective_of, require_projected

            if facts.aligned is None and run.makes("align"):
                # Students learn from the aligned cache that will be made from this one.
                continue
            recording, _ = choose(facts, settings)
            objective_of(settings, recording, run.reuse["cache"])
            if recording == "chunks":
                require_projected(settings, facts.recordings[recording].num_ids, run.reuse["cache"])


def _require_loggers(settings: TrainSettings) -> None:
    if any(logger not in _ALWAYS_THERE for logger in settings.loggers):
        # imported here because it imports Lightning
        from capgap.pipeline.train.loggers import require_loggers

        require_loggers(settings.loggers)


def _reused_facts(run: RunFile) -> CacheFacts | None:
    if "cache" not in run.reuse:
        return None
    folder = run.reuse["cache"]
    _, manifest = finished_stage("cache", folder, "cannot be reused", f"reuse.cache: {folder}", "a finished cache")
    return CacheFacts.model_validate(manifest.facts)
