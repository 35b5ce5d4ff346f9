"""Checks a run's tuning before any stage of the run begins."""

from __future__ import annotations

from pathlib import Path

from capgap.pipeline.models.checks import named
from capgap.pipeline.models.complete import require_complete
from capgap.pipeline.models.given import require_findable
from capgap.pipeline.stage.manifests import finished_stage
from capgap.pipeline.stage.ranks import require_shares
from capgap.pipeline.train.loggers import require_loggers
from capgap.pipeline.tune.files import chat_files
from capgap.pipeline.tune.lora import require_peft
from capgap.schemas.errors import InputError
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_tune import OWN_CACHE

_NAMED_TEMPLATES = ("own", "roles", None)


def require_tunable(run: RunFile) -> None:
    """Refuse a tuning whose conversations, template, model, cache or packages are missing.

    Raises:
        InputError, MachineError: One of these is missing.
        SettingError: The sequences of a step cannot be divided among the devices, or a logger does not exist.
    """
    settings = run.tune
    assert settings is not None
    require_shares(settings, settings.num_devices, "tune")
    require_loggers(settings.loggers)
    if settings.lora is not None:
        require_peft()
    if settings.sources:
        chat_files(settings)
    template = settings.chat_template
    if template not in _NAMED_TEMPLATES and not Path(str(template)).is_file():
        raise InputError(
            "no such chat template",
            where=f"tune.chat_template: {template}",
            expected="own, roles, or the path of a Jinja file",
        )
    if settings.path is not None:
        require_findable(settings.path, "tune.path")
        with named(f"tune.path: {settings.path}"):
            require_complete(settings.path, settings.trust_remote_code)
    if settings.cache not in (None, OWN_CACHE):
        folder = str(settings.cache)
        finished_stage("cache", folder, "cannot be reused", f"tune.cache: {folder}", "a finished cache")
