"""The configuration of a Hugging Face model, and the model that it describes without its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from capgap.pipeline.models.contents import contents_of, first_line
from capgap.pipeline.models.given import require_id
from capgap.pipeline.models.hub import not_there, require_reached
from capgap.pipeline.models.tokenizers import refuse_code
from capgap.pipeline.models.weight_files import no_config
from capgap.pipeline.store.pointers import require_no_pointer
from capgap.schemas.errors import InputError


def load_config(path: str, trust_remote_code: bool = False) -> Any:
    """Load the configuration of a causal language model.

    Raises:
        InputError: there is no configuration, it cannot be used, it needs code that is not trusted, or its model is
            not causal.
    """
    if Path(path).is_dir():
        _require_file(Path(path), path)
    require_id(path, path)
    try:
        with contents_of("the configuration cannot be used", path, "a config.json as transformers writes it"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        refuse_code(error, path)
        require_reached(path, error)
        if "does not recognize this architecture" in str(error):
            raise InputError(
                "transformers does not know this architecture",
                where=path,
                found=first_line(error).partition(" but ")[0],
                expected=f"one of transformers {transformers.__version__}",
                fix="install a newer transformers, or use another model",
            ) from None
        if "Unrecognized model" in str(error) and (names := _names_at_hub(path)):
            raise no_config(names, path) from None
        raise not_there("no model can be found", path, error, "config.json") from None
    _require_causal(config, path)
    return _with_whole_attention(config)


def _require_file(folder: Path, where: str) -> None:
    file = folder / "config.json"
    if not file.is_file():
        raise no_config([one.name for one in folder.iterdir() if one.is_file()], where)
    require_no_pointer(file, where)
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(
            "config.json is not valid JSON", where=where, found=first_line(error), fix="download that file again"
        ) from None
    if isinstance(values, dict) and values.get("model_type") is None:
        raise InputError(
            "config.json names no architecture",
            where=where,
            found=f"fields {', '.join(sorted(values))}"[:200] if values else "nothing in it",
            expected="model_type, as transformers writes it",
        )


def _names_at_hub(path: str) -> list[str]:
    try:
        return [] if Path(path).is_dir() else HfApi().list_repo_files(path)
    except (OSError, HfHubHTTPError):
        return []


def _require_causal(config: Any, where: str) -> None:
    """Raise InputError for an encoder, whose logits depend on the tokens that a student has to predict."""
    kinds, text = (MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING), config.get_text_config()
    ahead = getattr(text, "use_bidirectional_attention", None)
    # transformers can make either an encoder or a decoder of these types
    is_encoder = all(type(config) in kind for kind in kinds) and not any(
        getattr(config, name, False) for name in ("is_decoder", "causal", "is_encoder_decoder")
    )
    if is_encoder or ahead is True or ahead == "all" or getattr(text, "is_causal", None) is False:
        raise InputError(
            "this is no causal language model",
            where=where,
            found=f"a {config.model_type} whose tokens attend to later tokens",
            expected="a decoder, whose tokens attend to earlier tokens only",
        )


def _with_whole_attention(config: Any) -> Any:
    """Return the configuration with an attention implementation that supports all that the model needs.

    The attention of torch, which is transformers' default, silently leaves out the soft cap on attention logits. For a
    tiny Gemma 2 this changes label logprobs by 0.03 nats (rms).
    """
    for one in (config, config.get_text_config()):
        if getattr(one, "attn_logit_softcapping", None) is not None:
            one._attn_implementation = "eager"
    return config


def empty_model(config: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """Make a causal language model of this configuration on the device `meta`, without memory for its weights.

    Raises:
        InputError: transformers has no causal language model for this configuration.
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
    """Return the longest sequence, in tokens, that a model of this configuration takes; None for no limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
