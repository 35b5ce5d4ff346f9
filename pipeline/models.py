"""Hugging Face models as capgap meets them: where a stage's model lies, its facts, loading and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from capgap.pipeline.hub import require_reached
from capgap.pipeline.tokenizers import tokenizer_facts
from capgap.pipeline.workflow.context import StageInput
from capgap.schemas.errors import InputError
from capgap.schemas.facts import ModelFacts

MODEL_FOLDER = "model"

# its bars count files, which is noise between capgap's own
disable_progress_bar()


def model_path(made: StageInput) -> str:
    """The folder or id of the model that a teacher, student or train stage made or was given."""
    facts = ModelFacts.model_validate(made.manifest.facts)
    return str(made.path / MODEL_FOLDER) if facts.path == MODEL_FOLDER else facts.path


def load_model(path: str, device: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model in evaluation mode; code that comes with a model is never run.

    Args:
        path: folder or id.
        device: `cpu` or `cuda:0`.
        dtype: of its weights; the one it was saved in where it is left out.

    Raises:
        InputError: there is no such model, or it is no causal language model.
    """
    config = load_config(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype or "auto", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        require_reached(path, error)
        raise InputError("the model cannot be loaded", where=path, found=_first_line(error)) from None
    return model.to(device).eval()


def load_config(path: str) -> Any:
    """The configuration of a model.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        require_reached(path, error)
        raise InputError(
            "no model can be found",
            where=path,
            found=_first_line(error),
            expected="a Hugging Face folder with config.json, or an id that can be downloaded",
        ) from None


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights as safetensors, configuration and tokenizer: a folder that transformers and vLLM open."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_facts(model_or_config: Any, tokenizer: PreTrainedTokenizerBase, path: str = MODEL_FOLDER) -> ModelFacts:
    """What later stages must know of a model; its sizes are counted without weights where only a config is given."""
    if isinstance(model_or_config, PreTrainedModel):
        model = model_or_config
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_or_config)
        model.tie_weights()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(parameter.numel() for parameter in model.parameters())
    outside = embedding.numel() if head is embedding else embedding.numel() + head.numel()
    config = model.config.get_text_config()
    return ModelFacts(
        tokenizer=tokenizer_facts(tokenizer),
        num_parameters=total,
        num_non_embedding_parameters=total - outside,
        padded_vocab_size=embedding.shape[0],
        max_positions=int(config.max_position_embeddings),
        path=path,
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
