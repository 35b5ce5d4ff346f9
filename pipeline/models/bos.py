"""Find the ids that begin a document: the beginning-of-sequence token (BOS) that the model saw before every text.

A model that was trained with such a token predicts much worse without it: on the first 128 tokens of texts Gemma 3 270M
has a loss of 5.4 nats/token without and 3.5 with it, and on 128 tokens from the middle 5.8 and 3.4. A tokenizer
declares the token by its post-processor, or by `add_bos_token` in its tokenizer_config.json. Files that were converted
from GGUF have neither; the model family is then recognized by its architecture and by the name of the token.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from capgap.pipeline.models.tokenizer_files import file_at
from capgap.pipeline.models.tokenizer_parts import ids_around
from capgap.schemas.errors import InputError
from capgap.schemas.run_corpus import BosRule

_LOG = logging.getLogger("capgap")

# For each name of a BOS token, the beginnings of `model_type` of the architectures that were trained with it before
# every text. The name is needed, as families share an architecture: SmolLM2 is a llama without a token before texts.
_FAMILIES = {
    "<bos>": ("gemma", "recurrent_gemma", "shieldgemma", "vaultgemma"),
    "<|begin_of_text|>": ("llama", "mllama"),
    "<s>": ("llama", "mistral", "mixtral", "ministral"),
    "<BOS_TOKEN>": ("cohere",),
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>": ("deepseek", "llama", "qwen2", "qwen3"),
    "</s>": ("opt",),
}


def document_bos(tokenizer: PreTrainedTokenizerBase, path: str | Path | None, rule: BosRule) -> tuple[int, ...]:
    """Return the ids to be put before every document: usually one or none.

    Args:
        tokenizer: tokenizer of the corpus.
        path: folder or id of the tokenizer, whose config.json gives the architecture; None if capgap trained it.
        rule: `auto`, `never` or `always`.

    Raises:
        InputError: the rule is `always`, and the tokenizer has no BOS token.
    """
    own = tuple(ids_around(tokenizer)[0])
    if rule == "never":
        if own:
            _LOG.warning(
                "corpus.bos: never: no document begins with %s, as its tokenizer would have it", _name(tokenizer)
            )
        return ()
    if own:
        return own
    known = tokenizer.bos_token_id
    if rule == "auto":
        return (int(known),) if known is not None and path is not None and _is_usual(tokenizer, path) else ()
    if known is None:
        raise InputError(
            "the tokenizer has no token to begin a document with",
            where="corpus.bos: always",
            found="no bos_token",
            expected="a bos_token in its tokenizer_config.json",
            fix="set it there, or set corpus.bos to auto",
        )
    _LOG.warning(
        "corpus.bos: always: the tokenizer puts no %s before a text by itself, so a server does not either",
        _name(tokenizer),
    )
    return (int(known),)


def _is_usual(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> bool:
    """Return whether the files ask for a BOS token, or say nothing and the family is known to be trained with it."""
    families = _FAMILIES.get(str(tokenizer.bos_token), ())
    kind = str(_read(path, "config.json").get("model_type", ""))
    said = _read(path, "tokenizer_config.json").get("add_bos_token")
    if said is True:
        # transformers heeds add_bos_token only in some classes, and this tokenizer is read by another one
        _LOG.info("corpus.bos: %s: add_bos_token puts %s before a text", path, _name(tokenizer))
    elif said is None and kind.startswith(families):
        text = "corpus.bos: %s: the files put nothing before a text, but %s is trained with %s"
        _LOG.info(text, path, kind, _name(tokenizer))
    else:
        return False
    return True


def _read(path: str | Path, name: str) -> dict[str, Any]:
    file = file_at(path, name)
    try:
        values = json.loads(file.read_bytes()) if file is not None else {}
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return ascii(str(tokenizer.bos_token))
