"""Measures a cache from a sample of its shards, and from its teacher if one is given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from capgap.pipeline.fidelity.rows import LabelSums, RowsAtTemperature, SamplingErrorSums, labelled
from capgap.pipeline.fidelity.sample import Place, Sampling, places_of, read_places
from capgap.pipeline.fidelity.supports import supports
from capgap.pipeline.models.load import model_at
from capgap.pipeline.stage.context import StageInput
from capgap.pipeline.stage.device import resolve_device
from capgap.pipeline.stage.lease import leases
from capgap.pipeline.stage.manifests import finished_cache, require_of_tokens
from capgap.pipeline.store import ShardReader, target_temperature_of
from capgap.pipeline.store.batch import Sample, collate
from capgap.pipeline.store.stored import part_bytes
from capgap.schemas.errors import InputError
from capgap.schemas.facts import CacheFacts
from capgap.schemas.fidelity import Bytes, Fidelity, LiveFigures, RecordingFidelity
from capgap.schemas.records import ChunkTargets, Sequences
from capgap.schemas.run_cache import RecordingName


@dataclass(frozen=True)
class Teacher:
    """The teacher that scores some of the cache's sequences again.

    Attributes:
        path: The teacher's folder, the folder of its stage, or its id.
        device: `auto`, `cpu` or `cuda`.
        wait: Whether to wait for a device whose lease another stage holds.
        trust_remote_code: Whether to run code that comes with the teacher.
    """

    path: str
    device: str = "auto"
    wait: bool = True
    trust_remote_code: bool = False


def measure_cache(
    location: str, sampling: Sampling, teacher: Teacher | None = None, num_live_sequences: int = 16
) -> Fidelity:
    """Measure a finished cache.

    Args:
        location: Folder or URL of the cache.
        sampling: How much of the cache is read.
        teacher: The teacher that scores some sequences again, or None.
        num_live_sequences: Number of sequences of the sample, with a label each, that the teacher scores.

    Raises:
        InputError: There is no finished cache, it has no labels, it is aligned, or the teacher cannot be loaded.
        MismatchError: The teacher has another tokenizer.
        CorruptError: The manifest or shards are damaged.
        MachineError: The URL cannot be reached.
    """
    return fidelity_of(StageInput(*finished_cache(location)), sampling, teacher, num_live_sequences)


def fidelity_of(
    cache: StageInput, sampling: Sampling, teacher: Teacher | None = None, num_live_sequences: int = 16
) -> Fidelity:
    """Measure a cache whose manifest has been read, with the arguments and errors of `measure_cache`."""
    facts = CacheFacts.model_validate(cache.manifest.facts)
    require_of_tokens(facts, cache.location, "has no distributions to measure")
    names = sorted(facts.recordings)
    readers = {name: ShardReader(cache.location, cache.manifest.shard_sets[name]) for name in names}
    recordings = tuple(_recording(cache, facts, name, readers[name], sampling) for name in names)
    reader = readers[names[0]]
    places = places_of(reader, sampling)
    live = None
    if teacher is not None:
        live = _live(cache, facts, reader, places, teacher, num_live_sequences)
    return Fidelity(
        location=str(cache.location),
        tokenizer=facts.tokenizer,
        context=facts.context,
        temperature=facts.temperature,
        num_sequences=reader.shard_set.num_sequences,
        num_sampled=sum(len(rows_B) for _, _, rows_B in places),
        recordings=recordings,
        live=live,
    )


def _recording(
    cache: StageInput, facts: CacheFacts, name: RecordingName, reader: ShardReader, sampling: Sampling
) -> RecordingFidelity:
    about = facts.recordings[name]
    vocab_size = facts.tokenizer.vocab_size
    by_temperature = {t: RowsAtTemperature(t, about.num_ids, vocab_size) for t in sorted(about.temperatures)}
    labels, errors = LabelSums(), SamplingErrorSums(about.num_ids)
    parts: dict[str, int] = {}
    num_tokens = 0
    for sequences, targets, rows_B in read_places(reader, places_of(reader, sampling)):
        assert not isinstance(targets, ChunkTargets), "refused before"
        samples: list[Sample] = [(sequences, targets, int(row)) for row in rows_B]
        for temperature, rows in by_temperature.items():
            batch = collate(samples, about.num_ids, target_temperature_of(reader.codec, facts.temperature, temperature))
            ids_NK, p_NK, tail_N, labels_N = labelled(batch)
            if not len(labels_N):
                continue
            rows.add(p_NK, tail_N)
            if temperature == facts.temperature:
                mask_BL = sequences.mask_BL1[rows_B, 1:]
                labels.add(ids_NK, p_NK, labels_N, targets.label_logprobs_BL[rows_B][mask_BL].astype(np.float64))
                if name == "sampled":
                    errors.add(p_NK)
    for shard, member, _ in places_of(reader, sampling):
        stored = reader.read_stored(shard, member)
        for part, num_bytes in part_bytes(reader.codec, stored).items():
            parts[part] = parts.get(part, 0) + num_bytes
        num_tokens += len(stored) * reader.shard_set.seq_len
    if not labels.num_rows:
        raise InputError("the cache holds no labels", where=cache.location, found=f"recording {name}")
    return RecordingFidelity(
        recording=name,
        num_ids=about.num_ids,
        profile=about.profile,
        num_rows=labels.num_rows,
        by_temperature=tuple(rows.result() for rows in by_temperature.values()),
        sampling_errors=errors.result() if name == "sampled" else (),
        num_bytes=Bytes(
            stored=reader.shard_set.num_bytes / reader.shard_set.num_tokens,
            parts={part: num_bytes / num_tokens for part, num_bytes in parts.items()},
        ),
        supports=supports(facts, name),
        **labels.means(),
    )


def _live(
    cache: StageInput,
    facts: CacheFacts,
    reader: ShardReader,
    places: list[Place],
    teacher: Teacher,
    num_sequences: int,
) -> LiveFigures:
    # imported here because measuring a cache without its teacher needs no model
    from capgap.pipeline.fidelity.live import live_figures, require_tokenizer_of

    path = model_at(teacher.path)
    require_tokenizer_of(cache, path, teacher.trust_remote_code)
    sequences = _labelled_sequences(reader, places, num_sequences)
    device = resolve_device(teacher.device)
    with leases([device], f"fidelity of {cache.location}", teacher.wait):
        return live_figures(
            sequences,
            facts,
            path,
            {recording.num_ids for recording in facts.recordings.values()},
            device,
            teacher.trust_remote_code,
        )


def _labelled_sequences(reader: ShardReader, places: list[Place], num_sequences: int) -> Sequences:
    """Return the first sequences of the sample that have a label."""
    found: list[Sequences] = []
    missing = num_sequences
    for sequences, _, rows_B in read_places(reader, places):
        with_label_B = rows_B[sequences.mask_BL1[rows_B, 1:].any(axis=1)][:missing]
        found.append(sequences.part(with_label_B))
        missing -= len(with_label_B)
        if missing == 0:
            break
    return Sequences.joined(found)
