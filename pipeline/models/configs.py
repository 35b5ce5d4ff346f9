"""The configuration of a Hugging Face model, and the model that it describes without its weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from capgap.pipeline.models.contents import contents_of, first_line
from capgap.pipeline.models.hub import not_there, require_reached
from capgap.pipeline.models.tokenizers import refuse_code
from capgap.schemas.errors import InputError


def load_config(path: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a model.

    Raises:
        InputError: there is none, it cannot be used, or it needs code that is not trusted.
    """
    try:
        with contents_of("the configuration cannot be used", path, "a config.json as transformers writes it"):
            return _with_whole_attention(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code))
    except (OSError, ValueError) as error:
        refuse_code(error, path)
        require_reached(path, error)
        raise not_there("no model can be found", path, error, "config.json") from None


def _with_whole_attention(config: Any) -> Any:
    """The configuration, with an attention that does all that the model asks for.

    That of torch, which transformers takes by itself, leaves out the cap on attention's logits and says nothing: of a
    tiny Gemma 2, 0.03 nats a label (rms).
    """
    for one in (config, config.get_text_config()):
        if getattr(one, "attn_logit_softcapping", None) is not None:
            one._attn_implementation = "eager"
    return config


def empty_model(config: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model of this configuration without memory for its weights.

    Raises:
        InputError: transformers has none.
    """
    where = config.name_or_path or config.model_type
    try:
        with contents_of("the configuration cannot be used", where, "sizes and names of a model"), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        refuse_code(error, where)
        raise InputError(
            "this is no causal language model",
            where=where,
            found=first_line(error).partition(". ")[0],
            expected="an architecture of transformers' AutoModelForCausalLM",
        ) from None
    model.tie_weights()
    return model


def max_positions(config: Any) -> int | None:
    """Longest sequence that a model of this configuration takes; None where nothing bounds it."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
