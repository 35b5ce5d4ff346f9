"""Ask the live teacher again: a sample of a cache's sequences is scored anew and held against what was kept.

    sample --> alone, one submission each ----------+
       |                                            +--> the teacher against itself: the noise floor
       +-----> together, in batches as in the cache-+
       |                                            +--> the cache against the teacher
       +-----> read from the shards ----------------+

The rule: the cache may lie at most `FACTOR` times as far from the teacher as the teacher from itself, and beyond that
by the error that the profile states and by `SLACK_NATS`, or `SLACK_SAMPLES` of the samples. The factor leaves room for
the largest of few differences to be small by luck, and for sums of another kind of machine; the slack for a floor of 0.
Another teacher, or rows of another token, are apart by whole nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from capgap.pipeline.cache.convert import join, to_requests, to_targets
from capgap.pipeline.cache.scoring import Engine, Scored
from capgap.pipeline.cache.shards import CacheJob, start_engine
from capgap.pipeline.models.load import MODEL_FOLDER, model_at, model_path
from capgap.pipeline.stage.context import StageInput
from capgap.pipeline.stage.device import devices_from, resolve_device
from capgap.pipeline.stage.lease import leases
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.files import files_below
from capgap.pipeline.verify.compare import Apart, apart
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.facts import CacheFacts
from capgap.schemas.manifest import MANIFEST_NAME, Manifest
from capgap.schemas.records import SampledTargets, Targets, TopkTargets
from capgap.schemas.run_cache import CacheSettings, RecordingName

FACTOR = 4
SLACK_NATS = 1e-3
SLACK_SAMPLES = 0.01


Place = tuple[int, int]
"""A sequence of a cache: its member, and its row in there."""


def rescore(
    folder: Path,
    fraction: float,
    *,
    teacher: str | None = None,
    device: str = "auto",
    wait: bool = True,
    trust_remote_code: bool = False,
) -> Iterator[str]:
    """Lines about each cache at or below `folder`; the module's docstring explains them.

    Args:
        folder: of a run or a cache.
        fraction: of the sequences; one at least.
        teacher: its folder or id, where it is not where it was.
        device: `auto`, `cpu` or `cuda`.
        wait: wait for a device that a stage holds.
        trust_remote_code: run code that comes with the teacher; what the cache records about that is not used.

    Raises:
        InputError: there is no cache, or no teacher; or a cache was imported.
        MismatchError: a cache does not hold what its teacher gives.
        CapgapError: as the engine, the lease and the reader.
    """
    paths = sorted(path for path in files_below(folder) if path.name == MANIFEST_NAME)
    caches = [(path.parent, manifest) for path in paths if (manifest := _cache_at(path.parent)) is not None]
    if not caches:
        raise InputError("no finished cache", where=folder, fix="name the folder of a run or of its stage cache")
    place = resolve_device(device)
    for path, manifest in caches:
        job = replace(_job(path, manifest, teacher, place), trust_remote_code=trust_remote_code)
        devices = devices_from(place, job.settings.num_devices)
        with leases(devices, f"verify --rescore of {path}", wait):
            yield from _rescore_cache(job, manifest, fraction)


def sample_of(manifest: Manifest, fraction: float) -> list[Place]:
    """The same sequences for the same cache and fraction, spread over all shards at random."""
    shard_set = next(iter(manifest.shard_sets.values()))
    sizes = [member.num_sequences for shard in shard_set.shards for member in shard.each_member()]
    ends = np.cumsum(sizes)
    count = min(int(ends[-1]), max(1, math.ceil(fraction * int(ends[-1]))))
    rng = np.random.default_rng(int(manifest.content[:16], 16))
    chosen = np.sort(rng.choice(int(ends[-1]), count, replace=False))
    members = np.searchsorted(ends, chosen, side="right")
    rows = chosen - (ends[members] - np.asarray(sizes)[members])
    return list(zip(members.tolist(), rows.tolist(), strict=True))


def _cache_at(folder: Path) -> Manifest | None:
    manifest = read_manifest(folder)
    return manifest if manifest is not None and manifest.stage == "cache" else None


def _job(folder: Path, manifest: Manifest, teacher: str | None, device: str) -> CacheJob:
    """The cache's own job, with the engine and the dtype that made it."""
    facts = CacheFacts.model_validate(manifest.facts)
    if "cache" not in manifest.resolved:
        raise InputError(
            "an imported cache cannot be scored again",
            where=folder,
            found=f"engine {', '.join(facts.engines)}, dtype {', '.join(facts.dtypes)}",
            expected="the engine and the dtype that made it",
            fix="score its corpus with `capgap cache` to compare",
        )
    settings = CacheSettings.model_validate(manifest.resolved["cache"])
    made_by = {name.split()[0] for name in facts.engines}
    if settings.engine not in made_by:
        settings = settings.model_copy(update={"engine": min(made_by)})
    if len(facts.dtypes) == 1:
        settings = settings.model_copy(update={"dtype": facts.dtypes[0]})
    shard_set = next(iter(manifest.shard_sets.values()))
    return CacheJob(
        settings=settings,
        corpus=folder,
        source=shard_set,
        num_training=len(shard_set.shards),
        context=facts.context,
        teacher=_teacher_path(folder, manifest, teacher),
        folder=folder,
        work=folder,
        vocab_size=facts.tokenizer.vocab_size,
        ranking_sha256=str(shard_set.codec_settings["ranking_sha256"]),
        device=device,
    )


def _teacher_path(folder: Path, manifest: Manifest, teacher: str | None) -> str:
    recorded = manifest.inputs["teacher"].path
    if teacher is not None:
        return model_at(teacher)
    # beside the cache, where the whole run was moved
    for place in (Path(recorded), folder.parent / "teacher"):
        made = read_manifest(place)
        if made is None:
            continue
        path = model_path(StageInput(place, made))
        if Path(path).is_dir() or path != str(place / MODEL_FOLDER):
            return path
    raise InputError(
        "the teacher is not where it was", where=folder, found=f"no finished teacher at {recorded}",
        fix="name its folder with --teacher",
    )  # fmt: skip


def _rescore_cache(job: CacheJob, manifest: Manifest, fraction: float) -> Iterator[str]:
    sample = sample_of(manifest, fraction)
    readers = {name: ShardReader(job.folder, manifest.shard_sets[name]) for name in job.settings.recordings}
    engine = start_engine(job)
    try:
        together, alone = _score(engine, job, next(iter(readers.values())), sample)
        where = f"{engine.name}, {engine.dtype}, on {job.device}"
    finally:
        engine.close()
    num_rows = len(sample) * job.source.seq_len
    yield (
        f"{manifest.instance}: {len(sample):,} of {job.source.num_sequences:,} sequences, {num_rows:,} targets, "
        f"scored again by {where}"
    )
    wrong = []
    for name, reader in readers.items():
        num_ids = job.settings.num_ids(name)
        kept = _kept(reader, sample)
        live = to_targets(together, name)
        floor = apart(live, to_targets(alone, name), num_ids)
        found = apart(kept, live, num_ids, reader.codec.error)
        lines, faults = _judge(name, found, floor, max(reader.codec.error.kept_nats, reader.codec.error.label_nats))
        yield from lines
        wrong += faults
    if wrong:
        raise MismatchError(
            "the cache does not hold what its teacher gives",
            where=job.folder,
            found="; ".join(wrong),
            fix=f"name the teacher that it was made with, or make it again with `capgap run RUN.yaml --only "
            f"{manifest.instance} --force`",
        )
    yield f"{manifest.instance}: agrees with its teacher"


def _score(
    engine: Engine, job: CacheJob, reader: ShardReader, sample: list[Place]
) -> tuple[list[Scored], list[Scored]]:
    """The sample in full batches, with others of its members as company; and each sequence by itself."""
    blocks = [(reader.read(member)[0], row) for member, row in sample]
    requests = [to_requests(b.tokens_BL1[row], b.starts_BL1[row], job.context) for b, row in blocks]
    num_beside = max(0, job.settings.batch_tokens // job.source.seq_len - len(requests))
    block, first = blocks[0]
    company = [
        request
        for row in range(min(num_beside + 1, len(block)))
        if row != first
        for request in to_requests(block.tokens_BL1[row], block.starts_BL1[row], job.context)
    ]
    answers = iter(engine.score([*(request for several in requests for request in several), *company]))
    together = [join([next(answers) for _ in several]) for several in requests]
    alone = [join([engine.score([request])[0] for request in several]) for several in requests]
    return together, alone


def _kept(reader: ShardReader, sample: list[Place]) -> Targets:
    """The sample's targets as one block."""
    parts = [_row(reader.read(member)[1], row) for member, row in sample]
    first = parts[0]
    fields = vars(first)
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in fields}
    return type(first)(**joined)


def _row(targets: Targets | None, row: int) -> Targets:
    """Targets of one sequence of a block."""
    assert targets is not None
    one = slice(row, row + 1)
    if isinstance(targets, TopkTargets):
        return TopkTargets(*(values[one] for values in vars(targets).values()))
    start = int(targets.num_ids_BL[:row].sum())
    ids = slice(start, start + int(targets.num_ids_BL[row].sum()))
    return SampledTargets(
        targets.num_ids_BL[one], targets.ids_D[ids], targets.counts_D[ids], targets.label_logprobs_BL[one]
    )


def _judge(name: RecordingName, found: Apart, floor: Apart, error_nats: float) -> tuple[list[str], list[str]]:
    """Lines about one recording, and what is wrong with it."""
    most = FACTOR * floor.max_nats + error_nats + SLACK_NATS
    mean = FACTOR * floor.mean_nats + error_nats + SLACK_NATS
    what = "labels" if name == "sampled" else "kept ids and labels"
    others = f"{found.num_other_rows:,} of {found.num_rows:,} rows"
    lines = [
        f"  {name}: logprobs of {what} are at most {found.max_nats:.2g} nats apart, {found.mean_nats:.2g} on average; "
        f"the teacher from itself {floor.max_nats:.2g} and {floor.mean_nats:.2g}; allowed {most:.2g} and {mean:.2g}"
    ]
    wrong = []
    # not a number is wrong too
    if not found.max_nats <= most:
        wrong.append(f"{name} logprobs {found.max_nats:.3g} nats apart where {most:.3g} are allowed")
    if not found.mean_nats <= mean:
        wrong.append(f"{name} logprobs {found.mean_nats:.3g} nats apart on average where {mean:.3g} are allowed")
    if name == "topk":
        lines.append(f"  {name}: {others} keep other ids; of the teacher's own {floor.num_other_rows:,}")
        return lines, wrong
    moved = FACTOR * floor.moved_samples + SLACK_SAMPLES
    lines.append(
        f"  {name}: {others} hold other samples, {found.moved_samples:.2%} of all; of the teacher's own "
        f"{floor.num_other_rows:,} and {floor.moved_samples:.2%}; allowed {moved:.2%}"
    )
    if found.moved_samples > moved:
        wrong.append(f"{found.moved_samples:.1%} other samples where {moved:.1%} are allowed")
    return lines, wrong
