"""Low-rank adapters by peft: put into a model, saved, merged.

The model keeps its class, so that loss, trainer and checkpoints meet what they know; what is not adapted is frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from capgap.pipeline.store.extras import adding
from capgap.pipeline.store.files import whole_folder
from capgap.schemas.errors import InputError, MachineError
from capgap.schemas.run_tune import LoraSettings


class Adapters:
    """The adapters of a model, whose first weights are a pure function of settings and seed.

    Args:
        model: receives them, in place.
        settings: of the adapters.
        seed: of their weights.

    Raises:
        MachineError: peft is not installed.
        InputError: the model has no such layers, or the head is among them.
    """

    def __init__(self, model: PreTrainedModel, settings: LoraSettings, seed: int) -> None:
        peft = _peft()
        head = next(name for name, part in model.named_modules() if part is model.get_output_embeddings())
        if any(f".{head}".endswith(f".{name}") for name in settings.target_modules or ()):
            raise _refusal(model, settings, "the head among them")
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(settings.target_modules) if settings.target_modules else "all-linear",
        )
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self._with_adapters = peft.get_peft_model(model, config)
        except ValueError as error:
            raise _refusal(model, settings, str(error).partition(". ")[0]) from None

    def save(self, folder: Path, with_embedding: bool) -> None:
        """Write them as peft does; `with_embedding` where it has rows that the model before did not have."""
        with whole_folder(folder) as whole:
            self._with_adapters.save_pretrained(str(whole), save_embedding_layers=with_embedding)

    def merge(self) -> PreTrainedModel:
        """The model with the adapters in its weights, and none beside them."""
        merged: PreTrainedModel = self._with_adapters.merge_and_unload()
        return merged.requires_grad_(True)


def require_peft() -> None:
    """Raise MachineError where peft is not installed."""
    _peft()


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError:
        raise MachineError(
            "adapters need a package that is not installed",
            where="tune.lora",
            found="no peft",
            fix=f"run {adding('lora')}",
        ) from None
    return peft


def _refusal(model: PreTrainedModel, settings: LoraSettings, found: str) -> InputError:
    return InputError(
        "these layers cannot be adapted",
        where=f"tune.lora.target_modules: {', '.join(settings.target_modules or ['every linear layer'])}",
        found=found,
        expected=f"linear layers of {model.config.model_type}, not the head",
        fix="leave it out for all of them",
    )
