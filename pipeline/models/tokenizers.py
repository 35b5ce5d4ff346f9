"""The identity of tokenizers: two that map one token differently must never meet in one run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from capgap.pipeline.models.hub import not_there, require_reached
from capgap.pipeline.models.text_growth import require_bounded_file, require_bounded_tokenizer
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.facts import TokenizerFacts


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or id.

    Raises:
        InputError: there is none, it needs code that is not trusted, or it makes too much of a text.
    """
    require_bounded_file(Path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        refuse_code(error, path)
        require_reached(str(path), error)
        raise not_there("no tokenizer can be found", path, error, "tokenizer.json") from None
    require_bounded_tokenizer(tokenizer, str(path))
    return tokenizer


def chat_template_of(path: str | Path) -> str | None:
    """The chat template of a tokenizer on this machine; None where it has none, or is not here."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError):
        return None
    template: str | None = tokenizer.chat_template
    return template


def refuse_code(error: Exception, where: str | Path) -> None:
    """Raise InputError if that is what transformers says of a model or tokenizer with code of its own."""
    if "trust_remote_code" in str(error):
        raise InputError(
            "needs Python code that comes with it, which is not run",
            where=where,
            fix="if you trust whoever wrote it, set teacher.trust_remote_code or student.trust_remote_code",
        ) from None


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> TokenizerFacts:
    """Fingerprint, real vocabulary size and the id that ends a document.

    Raises:
        InputError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token",
            where=tokenizer.name_or_path,
            expected="one, to stand between documents",
            fix="set eos_token in its tokenizer_config.json",
        )
    entries = _entries(tokenizer)
    text = json.dumps(entries, sort_keys=True, ensure_ascii=True)
    return TokenizerFacts(
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        vocab_size=max(entries["vocab"].values()) + 1,
        eos_id=int(tokenizer.eos_token_id),
    )


def require_same_tokenizer(
    expected: PreTrainedTokenizerBase, expected_where: str, found: PreTrainedTokenizerBase, found_where: str
) -> None:
    """Raise MismatchError, naming the first differing entry, unless both map every token to the same id."""
    difference = _first_difference(_entries(expected), _entries(found))
    if difference is not None:
        name, here, there = difference
        raise MismatchError(
            f"its tokenizer differs from that of {expected_where}",
            where=found_where,
            found=f"{name} = {there}",
            expected=here,
            fix="use models of one tokenizer, or set corpus.tokenizer to the teacher's folder",
        )


def require_extended_tokenizer(
    extended: PreTrainedTokenizerBase, extended_where: str, found: PreTrainedTokenizerBase, found_where: str
) -> None:
    """Raise MismatchError, naming the first differing entry, unless every entry of `found` has its id in `extended`.

    Special tokens must be the same ones.
    """
    whole, part = _entries(extended), _entries(found)
    whole["vocab"] = {token: number for token, number in whole["vocab"].items() if token in part["vocab"]}
    difference = _first_difference(whole, part)
    if difference is not None:
        name, here, there = difference
        raise MismatchError(
            f"the tokenizer of {extended_where} does not extend this one",
            where=found_where,
            found=f"{name} = {there}",
            expected=here,
            fix="make the corpus with this tokenizer, extended by corpus.extend_vocabulary or not",
        )


def _entries(tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {"vocab": dict(tokenizer.get_vocab()), "special": special}


def _first_difference(
    expected: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]
) -> tuple[str, str, str] | None:
    # in the order of the expected ids, which is that of the file
    for token in sorted(found["vocab"] | expected["vocab"], key=(found["vocab"] | expected["vocab"]).__getitem__):
        here, there = expected["vocab"].get(token), found["vocab"].get(token)
        if here != there:
            return f"id of {token!r}", _said(here), _said(there)
    for name in sorted(expected["special"].keys() | found["special"].keys()):
        here, there = expected["special"].get(name), found["special"].get(name)
        if here != there:
            return f"special token {name}", _said(here), _said(there)
    return None


def _said(value: object) -> str:
    return "none" if value is None else repr(value)
