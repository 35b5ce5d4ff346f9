"""Prepares what every process needs before it makes units of a corpus: the list of the sources and the tokenizer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import cast

from transformers import PreTrainedTokenizerBase

from capgap.pipeline.corpus.bad_records import BadRecords
from capgap.pipeline.corpus.chat import MarkedChat
from capgap.pipeline.corpus.conversations import ChatFormat
from capgap.pipeline.corpus.encode import write_text_tokenizer
from capgap.pipeline.corpus.extend import extend_tokenizer
from capgap.pipeline.corpus.files import folders_in_words
from capgap.pipeline.corpus.listing import Listing, list_units
from capgap.pipeline.corpus.records import Conversation
from capgap.pipeline.corpus.repeated import forget_repeated
from capgap.pipeline.corpus.sources import Document, read_documents
from capgap.pipeline.corpus.split import split_of
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.corpus.unit import UNITS_FOLDER, ChangedFileError, CorpusJob, taken_documents
from capgap.pipeline.models.bos import document_bos
from capgap.pipeline.models.text import TOKENIZER_FOLDER
from capgap.pipeline.models.tokenizers import load_tokenizer, tokenizer_facts
from capgap.pipeline.stage.context import StageContext
from capgap.pipeline.stage.folder import WORK_FOLDER, plan_units
from capgap.pipeline.store.files import whole_folder, write_atomically
from capgap.pipeline.store.sidecars import read_sidecar, write_sidecar
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.facts import TokenizerFacts
from capgap.schemas.run_corpus import CorpusSettings

_LOG = logging.getLogger("capgap")

_LISTING_NAME, _TOKENIZER_NAME, _TEXTS_NAME = "listing.json", "tokenizer.done", "text_tokenizer.json"
# A tokenizer is trained on at most so many bytes of text; where there is more, they come from so many units.
SAMPLE_BYTES, _SAMPLE_UNITS = 64 << 20, 256
_NO_FACTS = TokenizerFacts(fingerprint="", vocab_size=1, eos_id=0)


def prepare(context: StageContext) -> CorpusJob:
    """List the sources, make the tokenizer if it is not there yet, and return the job that all processes share.

    Every call for the same run and the same sources returns the same job.

    Raises:
        InputError: the sources cannot be read, or are empty; or a chat template does not mark answers.
        MismatchError: the sources changed since the unfinished corpus was begun.
    """
    settings, work = context.run.corpus, context.folder / WORK_FOLDER
    given = settings.tokenizer if settings.extend_vocabulary is None else None
    if settings.messages_field is not None:
        # refuse a chat template that cannot be used before all the text is read
        of_chat = ChatFormat if settings.whole_conversations else MarkedChat
        of_chat(load_tokenizer(str(settings.tokenizer)), f"corpus.tokenizer: {settings.tokenizer}")
    work.mkdir(exist_ok=True)
    listing = _listing(context, settings)
    plan_units(work, "units", len(listing.units), f"{UNITS_FOLDER}/*.json")
    folder = context.folder / TOKENIZER_FOLDER
    job = CorpusJob(settings, listing, context.folder, work, given or str(folder.resolve()), None, _NO_FACTS, ())
    if not (work / _TOKENIZER_NAME).is_file():
        tokenizer = _make_tokenizer(settings, job)
        with whole_folder(folder) as whole:
            tokenizer.save_pretrained(whole)
        write_atomically(work / _TOKENIZER_NAME, "")
    tokenizer = load_tokenizer(job.tokenizer)
    facts = tokenizer_facts(tokenizer)
    bos_ids = document_bos(tokenizer, settings.tokenizer, settings.bos)
    path = work / _TEXTS_NAME
    texts = path if path.is_file() or write_text_tokenizer(tokenizer, path) else None
    return CorpusJob(settings, listing, context.folder, work, job.tokenizer, texts, facts, bos_ids)


def _listing(context: StageContext, settings: CorpusSettings) -> Listing:
    path = context.folder / WORK_FOLDER / _LISTING_NAME
    before, listing = read_sidecar(path, Listing), list_units(settings)
    if listing == before:
        return before
    units = path.parent / UNITS_FOLDER
    if before is not None and units.is_dir() and any(units.iterdir()):
        changed = sorted({file.path for file in set(before.files) ^ set(listing.files)})
        raise MismatchError(
            "the sources changed since this corpus was begun",
            where=context.folder,
            found=f"{changed[0] if changed else 'the amounts of text'}{' and others' if len(changed) > 1 else ''}",
            expected="the sources as they were",
            fix="restore them to go on, or begin anew with --remake corpus",
        )
    if path.parent.is_dir():
        # the tokenizer in the folder was trained on other text, and the digests are of other text
        (path.parent / _TOKENIZER_NAME).unlink(missing_ok=True)
        (path.parent / _TEXTS_NAME).unlink(missing_ok=True)
        forget_repeated(path.parent)
    for line in folders_in_words(settings.paths):
        _LOG.info("corpus: %s", line)
    write_sidecar(path, listing)
    return listing


def _make_tokenizer(settings: CorpusSettings, job: CorpusJob) -> PreTrainedTokenizerBase:
    extend = settings.extend_vocabulary
    if settings.tokenizer is not None and extend is None:
        return load_tokenizer(settings.tokenizer)
    texts = _sampled_texts(job)
    if settings.tokenizer is not None and extend is not None:
        if extend.sources is not None:
            texts = _texts_of(extend.sources, settings)
        tokenizer = load_tokenizer(settings.tokenizer)
        return extend_tokenizer(tokenizer, _at_most(texts, SAMPLE_BYTES), extend.num_pieces, extend.min_frequency)
    first = next(texts, None)
    if first is None:
        raise empty_corpus(settings)
    return cast(PreTrainedTokenizerBase, train_tokenizer(_with(first, texts), settings.trained_vocab_size))


def empty_corpus(settings: CorpusSettings) -> InputError:
    """Return the error for a corpus without any text."""
    return InputError(
        "the corpus is empty",
        where=f"corpus.sources: {', '.join(settings.paths)}",
        found="no document with text in it",
        expected="some text",
    )


def _texts_of(sources: tuple[str, ...], settings: CorpusSettings) -> Iterator[str]:
    """Yield the text of `corpus.extend_vocabulary.sources`, which is read like that of `corpus.sources`."""
    section = "corpus.extend_vocabulary"
    bad = BadRecords(section, settings.on_bad_record, settings.max_bad_fraction)
    yield from map(_words, read_documents(sources, settings.text_field, settings.messages_field, bad, section))
    bad.finish()


def _sampled_texts(job: CorpusJob) -> Iterator[str]:
    """Yield text that is taken and not held out: all of it, or of evenly spaced units of a large corpus the beginnings.

    A beginning is as long as the share that is taken of its source, so that a mixture is learnt from by its weights.
    """
    settings, num_units = job.settings, len(job.listing.units)
    is_small = sum(job.listing.unit_bytes) <= SAMPLE_BYTES
    num_sampled = num_units if is_small else min(num_units, _SAMPLE_UNITS)
    sampled = [number * num_units // num_sampled for number in range(num_sampled)]
    shares = [job.listing.shares[job.listing.source_of(unit)] for unit in sampled]
    bad = BadRecords("corpus", settings.on_bad_record, settings.max_bad_fraction, num_named=0)
    seen: set[bytes] = set()
    for unit, share in zip(sampled, shares, strict=True):
        documents = taken_documents(job, unit, bad, [], {})
        texts = (_words(document) for document, _, digest in documents if _is_learnt(document, digest, settings, seen))
        # what was read of a file that changes meanwhile may be learnt from, and is left out of the corpus later
        with contextlib.suppress(ChangedFileError):
            yield from texts if is_small else _at_most(texts, int(SAMPLE_BYTES * share / sum(shares)))
    bad.finish()


def _is_learnt(document: Document, digest: bytes, settings: CorpusSettings, seen: set[bytes]) -> bool:
    """Return whether a tokenizer may be trained on a document: it is not held out, and its text is new."""
    if digest in seen or split_of(document.text, settings.teacher_fraction, settings.heldout_fraction) == "heldout":
        return False
    seen.add(digest)
    return True


def _words(document: Document) -> str:
    """Return the text that a tokenizer is trained on: of a conversation only what is said, without the JSON."""
    return document.text if document.messages is None else Conversation.from_json(document.messages).words


def _at_most(texts: Iterator[str], num_bytes: int) -> Iterator[str]:
    """Yield the first texts, up to `num_bytes` bytes in all; the last one is cut."""
    left = num_bytes
    for text in texts:
        data = text.encode()
        yield text if len(data) <= left else data[:left].decode(errors="ignore")
        left -= len(data)
        if left <= 0:
            return


def _with(first: str, texts: Iterator[str]) -> Iterator[str]:
    yield first
    yield from texts
