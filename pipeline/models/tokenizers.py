"""Load and compare tokenizers: two tokenizers that give a text different ids must never be used in the same run."""

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
    """Load the tokenizer of a folder or id, with the ids of its tokenizer.json.

    Raises:
        InputError: there is no tokenizer, its files cannot be read, it needs code that is not trusted, it can make a
            text too long, or it gives other ids than its tokenizer.json.
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
    # the file of an id may have been downloaded only by loading the tokenizer
    return as_in_file(tokenizer, reference or read_reference(path), path)


def _loaded(path: str | Path, trust_remote_code: bool, has_file: bool) -> PreTrainedTokenizerBase:
    """Load a tokenizer with transformers, by the generic class if its own class cannot read its tokenizer.json."""
    try:
        with contents_of(_UNREADABLE, path, _FILES):
            return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except InputError:
        if not has_file:
            raise
        with contents_of(_UNREADABLE, path, _FILES):
            return PreTrainedTokenizerFast.from_pretrained(str(path))


def chat_template_of(path: str | Path, known: Container[str] | None = None) -> ChatTemplates:
    """Return the chat templates of a tokenizer on this machine; None if it has none or is not on this machine.

    Args:
        path: the tokenizer's folder or id.
        known: vocabulary of the tokenizer that will use the templates. The result is None if the templates write
            special tokens outside it, as that tokenizer would split these like text. None leaves this check out.

    Raises:
        InputError: the files do not hold a tokenizer.
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
    """Give a model's own tokenizer, in place, the text's special tokens and, if it has none, its chat template.

    Args:
        text: the tokenizer of the text.
        own: the model's tokenizer, which gives every text the same ids. If its end-of-sequence token is not in the
            vocabulary of `text`, it is kept.
    """
    known = text.get_vocab()
    for name in _NAMES:
        said, theirs = getattr(own, name), getattr(text, name)
        # such a token ends a turn, and the model stops generating there
        is_own_end = name == "eos_token" and said is not None and said not in known
        if theirs is not None and said != theirs and not is_own_end:
            setattr(own, name, theirs)
    own.chat_template = own.chat_template or text.chat_template
    return own


def _without_mark(template: Any) -> Any:
    """Return a template without the byte order mark of some editors, with which every rendered text would begin."""
    if isinstance(template, dict):
        return {name: _without_mark(one) for name, one in template.items()}
    return template.removeprefix("\ufeff") if isinstance(template, str) else template


def refuse_code(error: Exception, where: str | Path) -> None:
    """Raise InputError if transformers' error says that a model or tokenizer needs code that comes with it."""
    if "trust_remote_code" in str(error):
        raise InputError(
            "needs Python code that comes with it, which is not run",
            where=where,
            fix="if you trust whoever wrote it, set teacher.trust_remote_code or student.trust_remote_code",
        ) from None


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> TokenizerFacts:
    """Return the fingerprint, the real vocabulary size and the id that ends a document.

    Raises:
        InputError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token",
            where=tokenizer.name_or_path,
            expected="an end-of-sequence token, to separate documents",
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
    """Raise MismatchError, naming the first differing entry, unless both tokenizers give every text the same ids.

    Two differences are only logged: another choice of special tokens, such as an end of turn instead of an end of
    document; and further special tokens of `found` with ids after all of `expected`, such as for padding, which no
    text contains.
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
        text = "%s: %d special tokens more than %s has, which occur in no text: %s"
        _LOG.info(text, found_where, len(further), expected_where, ", ".join(map(ascii, sorted(further)[:5])))
    _say_other_names(expected, expected_where, found, found_where)


def _further_specials(found: PreTrainedTokenizerBase, expected: TokenizerParts) -> set[str]:
    size = max(expected.vocab.values()) + 1
    added = found.added_tokens_decoder.items()
    return {one.content for number, one in added if one.special and number >= size} - expected.vocab.keys()


def require_extended_tokenizer(
    extended: PreTrainedTokenizerBase, extended_where: str, found: PreTrainedTokenizerBase, found_where: str
) -> None:
    """Raise MismatchError, naming the first differing entry, unless `extended` has every entry of `found` at its id.

    All else that decides ids must be equal in both tokenizers.
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
    """Log which special tokens differ between two tokenizers that give texts the same ids; `expected` decides."""
    other = [
        f"{name} is {getattr(found, name)!r}, not {getattr(expected, name)!r}"
        for name in _NAMES
        if getattr(found, name) != getattr(expected, name)
    ]
    if other:
        _LOG.info(
            "%s: the ids are those of %s, whose special tokens are used: %s",
            *(found_where, expected_where, "; ".join(other)),
        )
