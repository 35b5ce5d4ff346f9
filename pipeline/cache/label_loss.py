"""Check that the teacher that scored the corpus predicts its text as well as the teacher stage measured.

teacher stage  trains --> label loss of the first held-out sequences, in its totals
cache stage    scores --> label loss of the same split, from the shards that it wrote --> near, or refused

A label loss is the mean of -log p(next token) over labels, in nats/token. Both figures are means over sequences of one
split, and the shards give the spread between sequences, so the difference of two sound figures has the standard error

    sigma * sqrt(1 / num_sequences of one figure + 1 / num_sequences of the other)

where sigma is the spread of one sequence's share. Usually both figures use the same sequences and differ by far less.
Ten standard errors are allowed, and 0.05 nats for another dtype and engine and for the rounding of stored logprobs. No
sound teacher comes near this limit, and a teacher whose weights are noise is nats away.

The teacher stage does not load a given teacher, so it does not measure its loss, and there is nothing to compare with.
A loss that is hardly below the logarithm of the vocabulary size, the loss of a uniform guess, then gives a warning. It
is not refused, as a model may be that bad and still be the intended one.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np

from capgap.pipeline.store import ShardReader
from capgap.schemas.errors import MismatchError
from capgap.schemas.manifest import Manifest
from capgap.schemas.records import ChunkTargets

LABEL_LOSS, NUM_SEQUENCES = "label_loss", "num_label_loss_sequences"
"""Keys in the teacher stage's totals: the mean loss over labels, nats/token, and the number of held-out sequences."""

_LOG = logging.getLogger("capgap")

_STANDARD_ERRORS = 10.0
_SLACK_NATS = 0.05
# share of the loss of a uniform guess from which on a teacher is suspect
_KNOWS_NOTHING = 0.9


@dataclass(frozen=True)
class LabelLoss:
    """The label loss of a set of sequences.

    Attributes:
        mean: mean over all labels, nats/token.
        spread: standard deviation of one sequence's share in the mean, nats/token; NaN for fewer than two sequences.
        num_sequences: number of sequences.
    """

    mean: float
    spread: float
    num_sequences: int


def label_loss_of(reader: ShardReader) -> LabelLoss | None:
    """Return the label loss of all sequences of a shard set, by the stored logprobs; None if they have no label."""
    nats, labels = [], []
    for index in range(reader.shard_set.num_members):
        sequences, targets = reader.read(index)
        assert targets is not None and not isinstance(targets, ChunkTargets)
        counts_BL = sequences.mask_BL1[:, 1:] & ~np.isnan(targets.label_logprobs_BL)
        nats.append(-np.where(counts_BL, targets.label_logprobs_BL, 0.0).sum(axis=1, dtype=np.float64))
        labels.append(counts_BL.sum(axis=1))
    nats_S, labels_S = np.concatenate(nats), np.concatenate(labels)
    total = int(labels_S.sum())
    if not total:
        return None
    mean = float(nats_S.sum() / total)
    # linearised ratio of sums: each sequence's excess over the mean loss, scaled to the mean number of labels
    shares_S = (nats_S - mean * labels_S) * len(labels_S) / total
    spread = float(np.sqrt((shares_S**2).sum() / (len(shares_S) - 1))) if len(shares_S) > 1 else math.nan
    return LabelLoss(mean, spread, len(shares_S))


def require_as_measured(teacher: Manifest, heldout: ShardReader | None, where: str) -> None:
    """Refuse a cache whose label loss differs from the one that the teacher stage measured.

    Args:
        teacher: manifest of the teacher stage.
        heldout: the cache's held-out sequences, captured at temperature 1; None where the cache has none.
        where: name of the cache in errors.

    Raises:
        MismatchError: the two losses are farther apart than sequences, dtypes and engines explain.
    """
    expected, num_measured = teacher.totals.get(LABEL_LOSS), teacher.totals.get(NUM_SEQUENCES)
    if not isinstance(expected, float) or not isinstance(num_measured, int) or num_measured < 1:
        return
    found = None if heldout is None else label_loss_of(heldout)
    if found is None or found.num_sequences < 2:
        _LOG.info("cache: not compared with the loss that the teacher stage measured: too few held-out sequences")
        return
    error = found.spread * math.sqrt(1 / found.num_sequences + 1 / num_measured)
    allowed = _STANDARD_ERRORS * error + _SLACK_NATS
    # written with `not`, so that NaN is refused too
    if not abs(found.mean - expected) <= allowed:
        raise MismatchError(
            "the teacher does not predict the text as well as the teacher stage measured",
            where=where,
            found=f"{found.mean:.3f} nats/token over {found.num_sequences} held-out sequences",
            expected=f"{expected:.3f}, measured over {num_measured}, within {allowed:.3f}",
            fix="its weights, or the engine, are at fault: check them with `capgap verify`, then make the teacher "
            "again with --remake teacher, or set cache.engine to transformers",
        )
    _LOG.info(
        "cache: the teacher's loss on held-out text is %.3f nats/token, and was %.3f in the teacher stage",
        *(found.mean, expected),
    )


def say_if_it_knows_nothing(mean_nats: float, vocab_size: int) -> None:
    """Warn of a teacher whose mean label loss, in nats/token, is about that of a uniform guess over all ids."""
    most = math.log(vocab_size)
    if not mean_nats <= _KNOWS_NOTHING * most:
        _LOG.warning(
            "cache: the teacher's loss on the corpus is %.2f nats/token, and a model that knows nothing has %.2f: is it"
            " the intended model, and complete?",
            *(mean_nats, most),
        )
