"""Compare a student's distributions with the cache's targets of held-out sequences; this needs no teacher.

Legend: B sequences of a block, S sequences, N rows (labelled positions), K ids kept, V real vocabulary, R resamples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from capgap.kernels.sparse_kl import chunk_kl, chunk_sums
from capgap.kernels.sparse_kl.divergence import coarse
from capgap.pipeline.eval.calibration import CalibrationError
from capgap.pipeline.eval.compare import sums_of_sequences
from capgap.pipeline.eval.heldout import num_labels
from capgap.pipeline.eval.intervals import Float64Array, Int64Array, bootstrap_interval
from capgap.pipeline.eval.measure import score
from capgap.pipeline.stage.context import StageInput
from capgap.pipeline.stage.progress import Meter
from capgap.pipeline.store import Batch, ShardReader
from capgap.pipeline.store.batch import collate
from capgap.schemas.facts import CacheFacts, heldout_set
from capgap.schemas.records import ChunkTargets, Sequences
from capgap.schemas.results import AgainstCache, HeldoutCache
from capgap.schemas.run_cache import RecordingName

_LOG = logging.getLogger("capgap")


@dataclass(frozen=True)
class CachedRows:
    """The cache's held-out sequences in one recording.

    Attributes:
        reader: Reads their shards.
        facts: Facts of the cache's manifest.
        recording: The recording that is read.
        num_sequences: Number of sequences that are read at most; sequences without a label do not count.
    """

    reader: ShardReader
    facts: CacheFacts
    recording: RecordingName
    num_sequences: int

    def blocks(self) -> Iterator[tuple[Sequences, Batch, Float64Array]]:
        """Yield each block's sequences, their targets, and the teacher's logprobs of their labels [N], float64.

        Chunks have no logprobs of single labels, so that array is then empty.

        Raises:
            CorruptError: A shard is damaged.
            InputError: A shard cannot be read.
        """
        missing = self.num_sequences
        for index in range(self.reader.shard_set.num_members):
            sequences, targets = self.reader.read(index)
            assert targets is not None
            rows_B = np.flatnonzero(sequences.mask_BL1[:, 1:].any(axis=1))[:missing]
            missing -= len(rows_B)
            if len(rows_B):
                batch = collate([(sequences, targets, int(row)) for row in rows_B], self.reader.codec.num_ids)
                mask_BL = sequences.mask_BL1[rows_B, 1:]
                if isinstance(targets, ChunkTargets):
                    yield sequences.part(rows_B), batch, np.zeros(0)
                    continue
                yield sequences.part(rows_B), batch, targets.label_logprobs_BL[rows_B][mask_BL].astype(np.float64)
            if missing == 0:
                return

    def described(self) -> tuple[HeldoutCache, Int64Array]:
        """Describe what is read, and return the number of labels of each sequence [S]."""
        labels, nats = [], 0.0
        for sequences, _, label_logprobs_N in self.blocks():
            labels.append(num_labels(sequences))
            nats -= float(label_logprobs_N.sum())
        labels_S = np.concatenate(labels) if labels else np.zeros(0, np.int64)
        aligned = self.facts.aligned
        # an imported cache may lack the logprob of a label, which is then NaN, and so is the mean
        known = self.facts.temperature == 1 and aligned is None and not math.isnan(nats)
        found = HeldoutCache(
            recording=self.recording,
            temperature=self.facts.temperature,
            num_sequences=len(labels_S),
            num_labels=int(labels_S.sum()),
            teacher_loss=nats / int(labels_S.sum()) if known and len(labels_S) else None,
            teacher_bits_per_byte=aligned.teacher_bits_per_byte if aligned is not None else None,
        )
        return found, labels_S


def cached_rows(cache: StageInput, num_sequences: int) -> CachedRows | None:
    """Return the cache's held-out sequences, in the recording `topk` where it has that.

    None where the cache has no held-out sequences, or where some of their shards are in quarantine.
    """
    facts = CacheFacts.model_validate(cache.manifest.facts)
    names: list[RecordingName] = sorted(facts.recordings, reverse=True)
    for name in names:
        shards = cache.manifest.shard_sets.get(heldout_set(name))
        if shards is None or not shards.num_sequences:
            continue
        reader = ShardReader(cache.location, shards)
        if any(shard.file.path in reader.quarantined for shard in shards.shards):
            _LOG.warning("eval: held-out shards of the cache are in quarantine: they are not measured on")
            return None
        return CachedRows(reader, facts, name, num_sequences)
    return None


@dataclass(frozen=True)
class CachedSums:
    """One student's results on the cache's held-out sequences, each summed over the labels of a sequence.

    Attributes:
        nats_S: Loss of the text, in nats [S].
        apart_S: KL divergence, or cross-entropy with the teacher's samples, in nats [S].
        top1_S: Number of top-1 agreements [S]; has no meaning for chunks.
    """

    nats_S: Float64Array
    apart_S: Float64Array
    top1_S: Float64Array

    def result(self, recording: RecordingName, labels_S: Int64Array, weights_RS: Int64Array) -> AgainstCache:
        """Return the means over labels, with intervals over sequences."""
        count = labels_S.sum()
        apart = float(self.apart_S.sum() / count)
        return AgainstCache(
            loss=float(self.nats_S.sum() / count),
            kl=max(apart, 0.0) if recording == "topk" else None,
            teacher_ce=apart if recording == "sampled" else None,
            top1=None if recording == "chunks" else float(self.top1_S.sum() / count),
            interval=bootstrap_interval(self.apart_S, labels_S, weights_RS),
            top1_interval=None if recording == "chunks" else bootstrap_interval(self.top1_S, labels_S, weights_RS),
            chunk_kl=max(apart, 0.0) if recording == "chunks" else None,
        )


def score_on_cache(
    model: nn.Module,
    cached: CachedRows,
    *,
    name: str,
    vocab_size: int,
    batch_sequences: int,
    meter: Meter | None,
    calibration: CalibrationError | None = None,
) -> CachedSums:
    """Score a student on the cache's held-out sequences under the cache's context rule, as its teacher was scored.

    Args:
        model: A causal LM of Hugging Face's interface, on its device and in eval mode.
        cached: The sequences that are scored, with the targets that the student is compared with.
        name: Name of the model, for errors.
        vocab_size: Number of real ids.
        batch_sequences: Number of sequences in one forward pass.
        meter: Counts sequences and tokens.
        calibration: Counts these sequences, where they are the only text that the student is measured on; else None.

    Raises:
        InputError: A loss is not a number.
        CorruptError: A shard is damaged.
    """
    found: list[tuple[Float64Array, ...]] = []
    first = 0
    for sequences, batch, _ in cached.blocks():
        counted = None if calibration is None else calibration.part(first, first + len(sequences))
        first += len(sequences)
        of_chunks = batch.chunk_left_N is not None
        against = _ChunksAgainst(batch) if of_chunks else _Against(batch, cached.facts.temperature)
        nats_B = score(
            model,
            sequences,
            name=name,
            vocab_size=vocab_size,
            batch_sequences=batch_sequences,
            context=cached.facts.context,
            visit=against.add,
            num_visited=len(sequences),
            calibration=counted,
            meter=meter,
        )
        sums = partial(sums_of_sequences, labels_S=num_labels(sequences))
        rows_N2 = against.rows().numpy()
        found.append((nats_B, sums(rows_N2[:, 0]), sums(rows_N2[:, 1])))
    return CachedSums(*(np.concatenate(part) for part in zip(*found, strict=True)))


class _Against:
    """Takes a block's rows in order, and compares each with the target of its position."""

    def __init__(self, batch: Batch, temperature: float) -> None:
        assert batch.ids_NK is not None and batch.weights_NK is not None
        counted_N = batch.labels_BL.flatten() >= 0
        self._ids_NK, self._p_NK = batch.ids_NK[counted_N], batch.weights_NK[counted_N]
        self._tail_N = None if batch.tail_N is None else batch.tail_N[counted_N]
        self._temperature, self._num_rows = temperature, 0
        self._found: list[torch.Tensor] = []

    def rows(self) -> torch.Tensor:
        """Return what `against_targets` returned for all rows: float64 [N, 2]."""
        return torch.cat(self._found)

    def add(self, logprobs_NV: torch.Tensor) -> None:
        rows = slice(self._num_rows, self._num_rows + len(logprobs_NV))
        self._num_rows = rows.stop
        ids_NK, p_NK = self._ids_NK[rows].to(logprobs_NV.device), self._p_NK[rows].to(logprobs_NV.device)
        tail_N = None if self._tail_N is None else self._tail_N[rows].to(logprobs_NV.device)
        logq_NV = logprobs_NV if self._temperature == 1 else (logprobs_NV / self._temperature).log_softmax(-1)
        self._found.append(against_targets(ids_NK, p_NK, tail_N, logq_NV).cpu())


class _ChunksAgainst:
    """Takes a block's rows in order, and compares the student's likelihood of each chunk with the teacher's."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._labels_n = batch.labels_BL[batch.labels_BL >= 0]
        self._found: list[torch.Tensor] = []

    def add(self, logprobs_NV: torch.Tensor) -> None:
        first = sum(map(len, self._found))
        labels_N1 = self._labels_n[first : first + len(logprobs_NV), None].to(logprobs_NV.device)
        self._found.append(logprobs_NV.gather(1, labels_N1)[:, 0].double().cpu())

    def rows(self) -> torch.Tensor:
        """Return the chunk's divergence at each labelled row where a chunk ends (else 0), and 0: float64 [N, 2]."""
        left_N, teacher_N = self._batch.chunk_left_N, self._batch.chunk_logprobs_N
        assert left_N is not None and teacher_N is not None
        counted_N = self._batch.labels_BL.flatten() >= 0
        logprobs_N = torch.zeros(len(left_N), dtype=torch.float64)
        logprobs_N[counted_N] = torch.cat(self._found)
        apart_N = chunk_kl(teacher_N.double(), chunk_sums(logprobs_N, left_N)).where(left_N == 0, 0.0)
        return torch.stack([apart_N, torch.zeros_like(apart_N)], dim=1)[counted_N]


def against_targets(
    ids_NK: torch.Tensor, p_NK: torch.Tensor, tail_N: torch.Tensor | None, logq_NV: torch.Tensor
) -> torch.Tensor:
    """Return the student's distance from the target at each row, and whether their top-1 tokens agree: float64 [N, 2].

    With a tail, the distance is KL(teacher || student) with all ids that were not kept taken as one. Without a tail, it
    is the cross-entropy of the student with the teacher's samples. Both are in nats.

    Args:
        ids_NK: Ids of the target, int64 [N, K].
        p_NK: Their probabilities; 0 for padding [N, K].
        tail_N: Probability of all other ids [N]; None for samples, which have no tail.
        logq_NV: The student's logprobs, float32 [N, V].
    """
    logq_NK = logq_NV.gather(1, ids_NK).double()
    p_NK = p_NK.double()
    if tail_N is None:
        apart_N = -(p_NK * logq_NK).sum(dim=1)
    else:
        kept_NV = torch.zeros_like(logq_NV, dtype=torch.uint8).scatter_reduce_(
            1, ids_NK, (p_NK > 0).to(torch.uint8), "amax"
        )
        rest_N = logq_NV.double().masked_fill(kept_NV.bool(), float("-inf")).logsumexp(dim=1)
        apart_N = coarse(logq_NK, rest_N, p_NK, tail_N.double().clamp_min(0), "forward_kl", 0.5).value_B
    top1_N = ids_NK.gather(1, p_NK.argmax(dim=1, keepdim=True))[:, 0]
    return torch.stack([apart_N, (logq_NV.argmax(dim=1) == top1_N).double()], dim=1)
