"""Tokenizers: loaded with care, and their identity: two that give one text different ids must never meet in one run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Container
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from capgap.pipeline.models.contents import contents_of
from capgap.pipeline.models.given import TOKENIZER_FILES, require_id
from capgap.pipeline.models.hub import not_there, require_reached
from capgap.pipeline.models.text_growth import require_bounded_file, require_bounded_tokenizer
from capgap.pipeline.models.tokenizer_files import as_in_file, read_reference, require_files, require_reader
from capgap.pipeline.models.tokenizer_parts import Difference, TokenizerParts, first_difference, parts_of
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.facts import TokenizerFacts

_LOG = logging.getLogger("capgap")

ChatTemplates = str | dict[str, str] | None
"""One chat template, or several by their names, such as `default` and `tool_use`."""

_UNREADABLE, _FILES = "the tokenizer cannot be read", "the files of a tokenizer as transformers saves them"
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or id; its ids are those of its tokenizer.json.

    Raises:
        InputError: there is none, its files cannot be read, it needs code that is not trusted, it makes too much of
            a text, or it gives other ids than its tokenizer.json.
        MachineError: a package that reads its files is not installed, or the network fails.
    """
    require_bounded_file(Path(path))
    require_files(path)
    require_id(str(path), str(path), TOKENIZER_FILES)
    reference = read_reference(path)
    try:
        tokenizer = _loaded(path, trust_remote_code, reference is not None)
    except (OSError, ValueError, ImportError) as error:
        refuse_code(error, path)
        require_reached(str(path), error)
        require_reader(path, error)
        raise not_there("no tokenizer can be found", path, error, "tokenizer.json") from None
    tokenizer.chat_template = _without_mark(tokenizer.chat_template)
    require_bounded_tokenizer(tokenizer, str(path))
    # of an id the file may have come a moment ago
    return as_in_file(tokenizer, reference or read_reference(path), path)


def _loaded(path: str | Path, trust_remote_code: bool, has_file: bool) -> PreTrainedTokenizerBase:
    """As transformers loads it; where its class cannot read what lies in tokenizer.json, by the class that can."""
    try:
        with contents_of(_UNREADABLE, path, _FILES):
            return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except InputError:
        if not has_file:
            raise
        with contents_of(_UNREADABLE, path, _FILES):
            return PreTrainedTokenizerFast.from_pretrained(str(path))


def chat_template_of(path: str | Path, known: Container[str] | None = None) -> ChatTemplates:
    """What a tokenizer on this machine has of chat templates; None where it has none, or is not here.

    Args:
        path: its folder or id.
        known: the entries of the tokenizer that is to have them; None too where they write special tokens that it has
            not, for it would write these as pieces of text.

    Raises:
        InputError: its files hold what is no tokenizer.
    """
    try:
        with contents_of(_UNREADABLE, path, _FILES):
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError):
        return None
    templates: ChatTemplates = _without_mark(tokenizer.chat_template)
    if known is None or not templates:
        return templates
    text = templates if isinstance(templates, str) else "".join(templates.values())
    specials = (one.content for one in tokenizer.added_tokens_decoder.values() if one.special)
    lacking = [special for special in specials if special not in known and special in text]
    if lacking:
        said = "%s: its chat template is not kept with the text, whose tokenizer does not have %s"
        _LOG.info(said, path, ", ".join(map(ascii, lacking)))
    return None if lacking else templates


def with_names_of(text: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A model's own tokenizer, in place, with the text's names of special tokens and, where it has none, chat template.

    Args:
        text: the tokenizer of the text.
        own: of the model, which agrees with it; an end token that it alone has stays its own.
    """
    known = text.get_vocab()
    for name in _NAMES:
        said, theirs = getattr(own, name), getattr(text, name)
        # an end of turns that it alone has is where it stops
        is_own_end = name == "eos_token" and said is not None and said not in known
        if theirs is not None and said != theirs and not is_own_end:
            setattr(own, name, theirs)
    own.chat_template = own.chat_template or text.chat_template
    return own


def _without_mark(template: Any) -> Any:
    """A template without the byte order mark with which some editors begin a file: every text would begin with it."""
    if isinstance(template, dict):
        return {name: _without_mark(one) for name, one in template.items()}
    return template.removeprefix("\ufeff") if isinstance(template, str) else template


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
    parts = parts_of(tokenizer)
    return TokenizerFacts(
        fingerprint=hashlib.sha256(parts.text().encode()).hexdigest(),
        vocab_size=max(parts.vocab.values()) + 1,
        eos_id=int(tokenizer.eos_token_id),
    )


def require_same_tokenizer(
    expected: PreTrainedTokenizerBase, expected_where: str, found: PreTrainedTokenizerBase, found_where: str
) -> None:
    """Raise MismatchError, naming the first differing entry, unless both give every text the same ids.

    Special tokens that are only called otherwise, such as an end of turn for an end of document, are logged, no error;
    so are further ones behind all ids of the expected, such as for padding, which no text has.
    """
    here, there = parts_of(expected), parts_of(found)
    further = _further_specials(found, here)
    difference = first_difference(here, there.lacking(further))
    if difference is not None:
        raise _mismatch(
            f"its tokenizer differs from that of {expected_where}",
            found_where,
            difference,
            "use models of one tokenizer, or set corpus.tokenizer to the teacher's folder",
        )
    if further:
        text = "%s: %d special tokens more than %s has, which no text holds: %s"
        _LOG.info(text, found_where, len(further), expected_where, ", ".join(map(ascii, sorted(further)[:5])))
    _say_other_names(expected, expected_where, found, found_where)


def _further_specials(found: PreTrainedTokenizerBase, expected: TokenizerParts) -> set[str]:
    size = max(expected.vocab.values()) + 1
    added = found.added_tokens_decoder.items()
    return {one.content for number, one in added if one.special and number >= size} - expected.vocab.keys()


def require_extended_tokenizer(
    extended: PreTrainedTokenizerBase, extended_where: str, found: PreTrainedTokenizerBase, found_where: str
) -> None:
    """Raise MismatchError, naming the first differing entry, unless every entry of `found` has its id in `extended`.

    Whatever else decides ids must be the same.
    """
    part = parts_of(found)
    difference = first_difference(part.within(parts_of(extended)), part)
    if difference is not None:
        raise _mismatch(
            f"the tokenizer of {extended_where} does not extend this one",
            found_where,
            difference,
            "make the corpus with this tokenizer, extended by corpus.extend_vocabulary or not",
        )
    _say_other_names(extended, extended_where, found, found_where)


def _mismatch(what: str, where: str, difference: Difference, fix: str) -> MismatchError:
    name, here, there = difference
    return MismatchError(what, where=where, found=f"{name} = {there}", expected=here, fix=fix)


def _say_other_names(
    expected: PreTrainedTokenizerBase, expected_where: str, found: PreTrainedTokenizerBase, found_where: str
) -> None:
    """One line on special tokens that are named otherwise: ids of text are the same, and the first one decides."""
    other = [
        f"{name} is {getattr(found, name)!r}, not {getattr(expected, name)!r}"
        for name in _NAMES
        if getattr(found, name) != getattr(expected, name)
    ]
    if other:
        _LOG.info("%s: the ids are those of %s, whose names count: %s", found_where, expected_where, "; ".join(other))
