"""Load a tokenizer exactly as its tokenizer.json describes it, whatever class transformers would use for it.

Some classes of transformers rebuild the tokenizer from its vocabulary and merges, with their own normaliser and
pre-tokenizer: a byte-level vocabulary that is declared Llama's loses every space. The file decides the ids. Where the
class has changed a part, the generic class is used, which reads the file as it is; probe texts verify the result.
"""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from capgap.pipeline.models.contents import first_line
from capgap.pipeline.store.pointers import require_no_pointer
from capgap.schemas.errors import InputError, MachineError

_LOG = logging.getLogger("capgap")

TOKENIZER_FILE = "tokenizer.json"
# files of SentencePiece; for some models they hold the vocabulary of tiktoken
_PIECES_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

PROBES = (
    "Hello world, this is a test.",
    "  two blanks   three\tand a tab\n\n\nthree lines\r\n  indented = 12345 + 6.78e-9;",
    "I'll say it's what we've done; DON'T! CamelCase snake_case kebab-case http://a.b/c?d=e&f",
    "na\u00efve caf\u00e9 \u2014 \u201cquoted\u201d \u2026 \u00df \u00c5ngstr\u00f6m 50\u20ac \u00bd",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155 "
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 "
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # comment\n",
    " leading and trailing ",
)
"""Texts that different kinds of tokenizers split differently; composing characters (NFC) changes none of them."""


def require_files(path: str | Path) -> None:
    """Raise InputError if one of a folder's tokenizer files is a Git LFS pointer."""
    for name in (TOKENIZER_FILE, *_PIECES_FILES, "vocab.json", "merges.txt"):
        require_no_pointer(Path(path) / name, str(path))


def require_reader(path: str | Path, error: Exception) -> None:
    """Raise MachineError if `error` says that a package which reads the tokenizer's files is not installed."""
    said = str(error)
    file = next((name for name in _PIECES_FILES if file_at(path, name) is not None), None)
    if file is None or ("sentencepiece" not in said.lower() and "tiktoken" not in said.lower()):
        return
    missing = [name for name in ("sentencepiece", "google.protobuf") if not _is_there(name)] or ["tiktoken"]
    names = " ".join(name.replace("google.", "") for name in missing)
    raise MachineError(
        "the tokenizer cannot be read",
        where=path,
        found=f"{file} without a {TOKENIZER_FILE}, and a package that reads it is not installed",
        expected=names.replace(" ", " and "),
        fix=f"run `pip install {names}`, or save the tokenizer with a {TOKENIZER_FILE}",
    ) from None


def file_at(path: str | Path, name: str) -> Path | None:
    """Return the path of a file of a folder or of a downloaded id; None where it is not on this machine."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    try:
        found = try_to_load_from_cache(str(path), name)
    except HFValidationError:  # neither a folder nor an id
        return None
    return Path(found) if isinstance(found, str) else None


def read_reference(path: str | Path) -> Tokenizer | None:
    """Read tokenizer.json with the tokenizers library; None where there is no such file on this machine.

    Raises:
        InputError: the library cannot read the file, or the tokenizer draws ids at random.
    """
    file = file_at(path, TOKENIZER_FILE)
    if file is None:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
        dropout = getattr(tokenizer.model, "dropout", None)
        tokenizer.encode(PROBES[0])
    except BaseException as error:  # the library raises plain Exceptions, and a panic that is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise InputError(
            f"{TOKENIZER_FILE} cannot be read", where=path, found=first_line(error), expected="a tokenizer"
        ) from None
    if dropout:
        raise InputError(
            "the tokenizer's ids are drawn at random",
            where=path,
            found=f"dropout {dropout:g} in the model of {TOKENIZER_FILE}",
            expected="no dropout: a text must have the same ids each time",
            fix=f"set dropout to null in {TOKENIZER_FILE}",
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def as_in_file(
    tokenizer: PreTrainedTokenizerBase, reference: Tokenizer | None, path: str | Path
) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or the generic one of the same files where its class has changed a part that decides ids.

    Args:
        tokenizer: the tokenizer as transformers loaded it.
        reference: the result of `read_reference`; None where there is no tokenizer.json.
        path: folder or id that both come from.

    Raises:
        InputError: neither gives the ids of tokenizer.json, a byte-level tokenizer does not decode to the same text,
            or the end-of-sequence token is not in the vocabulary.
    """
    own = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(own, Tokenizer):
        return tokenizer
    if reference is None:
        _require_text_back(tokenizer, _parts(own), path)
        return tokenizer
    wanted = _parts(reference)
    if _parts(own) != wanted:
        generic = PreTrainedTokenizerFast.from_pretrained(str(path))
        changed = _first_probe(tokenizer, reference)
        if changed is not None:
            _LOG.warning(
                "%s: transformers' %s gives other ids than %s does, for %a: read with %s instead",
                *(path, type(tokenizer).__name__, TOKENIZER_FILE, changed[:40], type(generic).__name__),
            )
        tokenizer = generic
    probe = _first_probe(tokenizer, reference)
    if probe is not None:
        raise InputError(
            f"the tokenizer's ids are not those of its {TOKENIZER_FILE}",
            where=path,
            found=f"{_ids(tokenizer, probe)[:8]} for {probe[:40]!a}",
            expected=_ids_in_file(reference, probe)[:8],
            fix=f"save the tokenizer anew, with a tokenizer_config.json that agrees with its {TOKENIZER_FILE}",
        )
    _require_text_back(tokenizer, wanted, path)
    _require_known_end(tokenizer, reference, path)
    return tokenizer


def _require_known_end(tokenizer: PreTrainedTokenizerBase, reference: Tokenizer, path: str | Path) -> None:
    """Refuse an end-of-sequence token outside the vocabulary: transformers would give it an id that no model knows."""
    end = tokenizer.eos_token
    if end is not None and reference.token_to_id(str(end)) is None:
        raise InputError(
            "the end-of-sequence token is not in the vocabulary",
            where=path,
            found=f"eos_token {str(end)!a}, which {TOKENIZER_FILE} does not have",
            expected="a token that the model was trained with, to separate documents",
            fix="set eos_token in its tokenizer_config.json",
        )


def _parts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the parts that decide ids and decoding and that a class may have changed.

    Vocabulary and merges are left out. They take megabytes, every class takes them from the file, and the probe texts
    would show a difference.
    """
    steps = {name: getattr(tokenizer, name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    # the pickled state of these parts is JSON
    parts: dict[str, Any] = {name: step and json.loads(step.__getstate__()) for name, step in steps.items()}
    model = tokenizer.model
    settings = {name: getattr(model, name) for name in dir(model) if not name.startswith("_")}
    parts["model"] = {name: value for name, value in settings.items() if not callable(value)}
    return parts | {"kind": type(model).__name__}


def _first_probe(tokenizer: PreTrainedTokenizerBase, reference: Tokenizer) -> str | None:
    return next((text for text in PROBES if _ids(tokenizer, text) != _ids_in_file(reference, text)), None)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # a text that looks like a special token is split like other text, as in a corpus, whatever the configuration says
    try:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])
    except Exception:  # raised by the library where class and vocabulary do not belong together
        return []


def _ids_in_file(reference: Tokenizer, text: str) -> list[int]:
    ids: list[int] = reference.encode(text, add_special_tokens=False).ids
    return ids


def _require_text_back(tokenizer: PreTrainedTokenizerBase, parts: dict[str, Any], path: str | Path) -> None:
    """Refuse a byte-level tokenizer that does not decode the ids of a text to that text, up to a space before it."""
    if '"ByteLevel"' not in json.dumps(parts["decoder"]) or (parts["normalizer"] is not None and _changes(tokenizer)):
        return
    for text in PROBES:
        back = tokenizer.decode(_ids(tokenizer, text), clean_up_tokenization_spaces=False)
        if back not in (text, f" {text}"):
            raise InputError(
                "a byte-level tokenizer does not decode ids to their text",
                where=path,
                found=ascii(back[:60]),
                expected=ascii(text[:60]),
                fix="its pre-tokenizer, decoder and vocabulary do not belong together: use the original files",
            )


def _changes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer's normaliser changes texts on purpose, for example to lower case."""
    normaliser = tokenizer.backend_tokenizer.normalizer
    return normaliser is not None and any(normaliser.normalize_str(text) != text for text in PROBES)


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
