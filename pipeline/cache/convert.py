"""Convert sequences into requests, the rows of requests into rows of sequences, and scored sequences into targets.

Legend: B sequences, L targets, K ids kept, n samples, D distinct ids of the block.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from capgap.pipeline.cache.scoring import Request, Scored, sequence_digest
from capgap.schemas.records import BoolArray, FloatArray, IntArray, SampledTargets, Targets, TopkTargets
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_corpus import ContextRule


def to_requests(tokens_L1: IntArray, starts_L1: BoolArray, context: ContextRule) -> list[Request]:
    """Return the requests for one sequence: the whole sequence, or under the rule `document` each document by itself.

    A document's request ends with the token after the document, which is the label of its last target: this target is
    what the teacher expects after the document, whatever follows. A document that continues from an earlier sequence is
    scored as if it began here. Samples depend on sequence and place, so equal documents get independent samples.
    """
    if context == "packed":
        return [Request(tokens_L1)]
    length = len(tokens_L1) - 1
    firsts = [0, *(int(i) for i in np.flatnonzero(starts_L1[:length]) if i > 0), length]
    digest = sequence_digest(tokens_L1)
    share = 1 / (len(firsts) - 1)
    return [Request(tokens_L1[first : end + 1], _place_digest(digest, first), share) for first, end in pairwise(firsts)]


def join(parts: Sequence[Scored]) -> Scored:
    """Concatenate the rows of a sequence's requests."""
    if len(parts) == 1:
        return parts[0]
    rows = [field.name for field in dataclasses.fields(Scored) if field.name != "top_logprob"]
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in rows}
    return Scored(**joined, top_logprob=parts[-1].top_logprob)


def to_targets(scored: Sequence[Scored], recording: RecordingName) -> Targets:
    """Return the targets of one block of sequences in one of the recordings."""
    label_logprobs_BL = np.stack([s.label_logprobs_L for s in scored])
    if recording == "sampled":
        return _count(np.stack([s.samples_Ln for s in scored]), label_logprobs_BL)
    return TopkTargets(
        np.stack([s.ids_LK for s in scored]),
        np.stack([s.logprobs_LK for s in scored]),
        np.stack([s.tail_L for s in scored]),
        label_logprobs_BL,
        np.stack([s.log_tails_LT for s in scored]),
    )


def _place_digest(sequence: bytes, first: int) -> bytes:
    return hashlib.blake2b(sequence + first.to_bytes(4, "little"), digest_size=16).digest()


def _count(samples_BLn: IntArray, label_logprobs_BL: FloatArray) -> SampledTargets:
    """Return the distinct ids of each row and their counts, which are the run lengths of its ascending samples."""
    num_samples = samples_BLn.shape[2]
    samples_Nn = samples_BLn.reshape(-1, num_samples)
    first_Nn = np.ones(samples_Nn.shape, dtype=np.bool_)
    first_Nn[:, 1:] = samples_Nn[:, 1:] != samples_Nn[:, :-1]
    starts_D = np.flatnonzero(first_Nn)
    counts_D = np.diff(starts_D, append=samples_Nn.size)
    return SampledTargets(
        first_Nn.sum(axis=1, dtype=np.int32).reshape(label_logprobs_BL.shape),
        samples_Nn.ravel()[starts_D].astype(np.int32),
        counts_D.astype(np.int32),
        label_logprobs_BL,
    )
