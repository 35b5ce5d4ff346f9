"""What can be known of a run's trainings before anything of it is made."""

from __future__ import annotations

from capgap.pipeline.stage.manifests import finished_stage
from capgap.pipeline.stage.ranks import require_shares
from capgap.pipeline.stage.steps import require_a_step, seq_len_of
from capgap.schemas.facts import CacheFacts
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_train import TrainSettings

# loggers whose packages capgap itself depends on
_ALWAYS_THERE = ("tensorboard", "csv")


def require_trainable(run: RunFile) -> None:
    """Refuse arms that a reused cache does not support, that end before their first step or whose steps do not divide,
    and loggers that are not there.

    Raises:
        SettingError, MismatchError: an arm asks for what the cache has not, or for less than a step.
        InputError: a logger's package is not installed, or no finished cache lies where one is named.
    """
    facts = _reused_facts(run)
    for arm in run.arms:
        settings = run.train_settings(arm)
        _require_loggers(settings)
        require_shares(settings, settings.num_devices, "train")
        # steps of a mix, and sequences that align makes, are counted where they are
        if not settings.caches and not run.makes("align"):
            seq_len = seq_len_of(run, ("cache", "corpus"))
            require_a_step(settings.max_tokens, settings.batch_sequences, seq_len, f"train.max_tokens of arm {arm}")
        if facts is not None:
            # imported here: they bring torch
            from capgap.pipeline.train.caches import choose
            from capgap.pipeline.train.objective import objective_of, require_projected

            if facts.aligned is None and run.makes("align"):
                # what students learn from is made of it
                continue
            recording, _ = choose(facts, settings)
            objective_of(settings, recording, run.reuse["cache"])
            if recording == "chunks":
                require_projected(settings, facts.recordings[recording].num_ids, run.reuse["cache"])


def _require_loggers(settings: TrainSettings) -> None:
    if any(logger not in _ALWAYS_THERE for logger in settings.loggers):
        # imported here: it brings Lightning
        from capgap.pipeline.train.loggers import require_loggers

        require_loggers(settings.loggers)


def _reused_facts(run: RunFile) -> CacheFacts | None:
    if "cache" not in run.reuse:
        return None
    folder = run.reuse["cache"]
    _, manifest = finished_stage("cache", folder, "cannot be reused", f"reuse.cache: {folder}", "a finished cache")
    return CacheFacts.model_validate(manifest.facts)
