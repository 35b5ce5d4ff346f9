"""Adds low-rank adapters to a model, saves them and merges them, by peft.

The model keeps its class, so that loss, trainer and checkpoints work as with any other model. All weights except those
of the adapters are frozen.
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
    """The adapters of a model, whose first weights depend only on the settings and the seed.

    Args:
        model: The model, to which the adapters are added in place.
        settings: The settings of the adapters.
        seed: The seed of the adapters' first weights.

    Raises:
        MachineError: The package peft is not installed.
        InputError: The model does not have the layers that are to be adapted, or the head is among them.
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
        """Write the adapters in peft's format.

        Args:
            folder: The folder to write.
            with_embedding: Whether to save the embedding too, because rows were added to it.
        """
        with whole_folder(folder) as whole:
            self._with_adapters.save_pretrained(str(whole), save_embedding_layers=with_embedding)

    def merge(self) -> PreTrainedModel:
        """Return the model with the adapters merged into its weights and removed."""
        merged: PreTrainedModel = self._with_adapters.merge_and_unload()
        return merged.requires_grad_(True)


def require_peft() -> None:
    """Raise MachineError if the package peft is not installed."""
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
        fix="leave target_modules out to adapt every linear layer",
    )
