"""Assigns each document to a split by the digest of its text, so that it never moves and duplicates stay together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from capgap.pipeline.corpus.sources import Document
from capgap.schemas.run_corpus import SplitName
from capgap.schemas.run_file import RunFile

Split = SplitName
SPLITS: tuple[Split, ...] = ("teacher", "student", "heldout")


def split_of(text: str, teacher_fraction: float, heldout_fraction: float) -> Split:
    """Return the split of a text, which depends on nothing but the text and the fractions."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < heldout_fraction:
        return "heldout"
    return "teacher" if place < heldout_fraction + teacher_fraction else "student"


def kept_for_nobody(run: RunFile, num_tokens: float | None) -> str | None:
    """Return a warning if the corpus keeps text for a teacher that this run does not train; None otherwise.

    Args:
        run: the run file.
        num_tokens: number of tokens that are kept for the teacher; None if it is not known.
    """
    fraction = run.corpus.teacher_fraction
    if not fraction or not run.makes("corpus") or not run.makes("teacher") or run.teacher.optimization is not None:
        return None
    tokens = "" if num_tokens is None else f", {num_tokens:,.0f} tokens,"
    return (
        f"corpus.teacher_fraction keeps {100 * fraction:g} % of the documents{tokens} for a teacher that learns "
        "nothing here: set corpus.teacher_fraction: 0 to give them to the student"
    )


def split_documents(
    documents: Iterable[Document], teacher_fraction: float, heldout_fraction: float
) -> tuple[dict[Split, list[Document]], int]:
    """Return the documents of each split in their order, and the number of repeated texts that are left out."""
    found: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    seen: set[bytes] = set()
    repeated = 0
    for document in documents:
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if digest in seen:
            repeated += 1
            continue
        seen.add(digest)
        found[split_of(document.text, teacher_fraction, heldout_fraction)].append(document)
    return found, repeated
