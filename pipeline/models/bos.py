"""Which ids begin a document: those that the model has seen before every text, if there are any.

A model that was trained with such a token is another one without it: on the first 128 tokens of texts Gemma 3 270M
loses 5.4 nats/token without and 3.5 with it, and on 128 from the middle of texts 5.8 and 3.4. A tokenizer says so by
its post-processor, or by `add_bos_token` in its tokenizer_config.json. Files that were made of GGUF carry neither, and
there the family is known by its architecture and by what it calls the token.
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

# By the beginning token's name, the architectures (as config.json's model_type begins) that were trained with it before
# every text. The names tell apart what shares an architecture: SmolLM2 is a llama whose token is no beginning.
_FAMILIES = {
    "<bos>": ("gemma", "recurrent_gemma", "shieldgemma", "vaultgemma"),
    "<|begin_of_text|>": ("llama", "mllama"),
    "<s>": ("llama", "mistral", "mixtral", "ministral"),
    "<BOS_TOKEN>": ("cohere",),
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>": ("deepseek", "llama", "qwen2", "qwen3"),
    "</s>": ("opt",),
}


def document_bos(tokenizer: PreTrainedTokenizerBase, path: str | Path | None, rule: BosRule) -> tuple[int, ...]:
    """The ids that stand before every document, one as a rule; none where nothing does.

    Args:
        tokenizer: of the corpus.
        path: folder or id that it comes from, whose config.json names the family; None where it was trained here.
        rule: `auto`, `never` or `always`.

    Raises:
        InputError: one must stand there, and the tokenizer has none.
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
            expected="one in its tokenizer_config.json",
            fix="name one there, or set corpus.bos to auto",
        )
    _LOG.warning(
        "corpus.bos: always: the tokenizer puts no %s before a text by itself, in serving too", _name(tokenizer)
    )
    return (int(known),)


def _is_usual(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> bool:
    """Whether the files say so, or else the family is known to begin texts so."""
    families = _FAMILIES.get(str(tokenizer.bos_token), ())
    kind = str(_read(path, "config.json").get("model_type", ""))
    said = _read(path, "tokenizer_config.json").get("add_bos_token")
    if said is True:
        # to a class that a tokenizer.json of another kind is not read with
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
