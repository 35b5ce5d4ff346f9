"""How fast a stage works: as stated, as an earlier run measured, as `--calibrate` probed, or from a device's peak."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from capgap.pipeline.plan.work import RunWork
from capgap.pipeline.stage.manifests import read_manifest
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.manifest import MANIFEST_NAME, Manifest
from capgap.schemas.plan import Calibration, Figure
from capgap.schemas.run_file import RunFile

STAGES_WITH_A_RATE = ("teacher", "cache", "train", "eval")
CALIBRATION_NAME = "calibration.json"

_OF_A_TRAINING = ("precision", "num_devices", "activation_checkpointing", "compile")

# Settings of the resolved run file, by dotted name, that must be equal before another run's rate is used for this run.
_SAME: dict[str, tuple[str, ...]] = {
    "teacher": (
        "teacher.path",
        "teacher.model",
        *(f"teacher.{section}.{name}" for section in ("training", "adapt") for name in _OF_A_TRAINING),
        "corpus.seq_len",
        "device",
    ),
    "cache": (
        "teacher.path",
        "teacher.model",
        "teacher.served",
        "cache.engine",
        "cache.dtype",
        "cache.recording",
        "cache.tensor_parallel",
        "cache.replicas",
        "corpus.seq_len",
        "device",
    ),
    "train": (
        "student",
        *(f"train.{name}" for name in _OF_A_TRAINING),
        "train.micro_batch_sequences",
        "train.batch_sequences",
        "train.row_len",
        "corpus.seq_len",
        "device",
    ),
    "eval": ("teacher.path", "teacher.model", "student", "corpus.seq_len", "device"),
    "student": ("teacher.path", "teacher.model", "student", "corpus.seq_len", "device"),
}


@dataclass(frozen=True)
class Stated:
    """Speeds that the user states.

    Attributes:
        teacher_tokens_per_s: Tokens/s of one engine of the cache stage.
        train_tokens_per_s: Tokens/s of one student's training on all its devices together.
        online_teacher_tokens_per_s: Tokens/s of a teacher that only scores, beside a student that trains, on all
            devices of the training together; None for the rate of the cache stage.
        device_peak_tflops: Peak of one device, in 10^12 operations per second.
        mfu: Share of that peak which is used, above 0 and at most 1.
        like: Folders of finished runs whose rates may be used.
    """

    teacher_tokens_per_s: float | None = None
    train_tokens_per_s: float | None = None
    online_teacher_tokens_per_s: float | None = None
    device_peak_tflops: float | None = None
    mfu: float | None = None
    like: tuple[str, ...] = ()


def require_rates(folders: Iterable[str]) -> None:
    """Refuse folders that hold no measured rate of a stage.

    Raises:
        InputError: A folder holds no finished stage that has a rate, and no probed rates.
    """
    for folder in folders:
        if not (Path(folder) / CALIBRATION_NAME).is_file() and next(_all_manifests(folder), None) is None:
            raise InputError(
                "the folder holds no finished stage whose rate could be used",
                where="--like",
                found=folder if Path(folder).is_dir() else f"{folder}, which is no folder",
                expected=f"the folder of a run that has finished one of the stages {', '.join(_SAME)}",
            )


def unlike_notes(run: RunFile, folders: Iterable[str], stages: Collection[str]) -> list[str]:
    """Return a note for each folder none of whose rates can be used for these stages, with the settings that differ."""
    wanted, notes = run.model_dump(mode="json"), []
    for folder in folders:
        found = [(one.stage, one.resolved) for _, one in _all_manifests(folder)]
        found += [(stage, known.resolved) for known in _calibrations([folder]) for stage in known.tokens_per_s]
        found = [(stage, resolved) for stage, resolved in found if stage in stages]
        if any(_is_alike(stage, resolved, wanted) for stage, resolved in found):
            continue
        differing = {stage: _differing(stage, resolved, wanted) for stage, resolved in found}
        told = "; ".join(f"{stage}: different {', '.join(names)}" for stage, names in differing.items())
        notes.append(
            f"no rate of {folder} can be used for this run ({told or 'it has none of the stages that this run makes'})"
        )
    return notes


def rate_of(stage: str, work: RunWork, stated: Stated, arm: str | None = None) -> Figure:
    """Return the tokens/s of one engine or training on all its devices, from the first source that has it.

    Args:
        stage: The stage whose rate is wanted.
        work: What the run has to do.
        stated: Speeds that the user states.
        arm: Arm of a training. If it asks the teacher online, each token takes the student's time plus the teacher's.
    """
    if stage not in STAGES_WITH_A_RATE or work.tokens(stage, arm).value == 0:
        to_do = work.tokens(stage, arm)
        return Figure(value=None, source="no rate is known for this stage" if to_do.value else to_do.source)
    if work.asks_the_teacher(arm):
        return _rate_beside_the_teacher(work, stated, arm)
    known, why = _found(stage, work, stated)
    return _computed(stage, work, stated, arm, why) if known is None else known


def _rate_beside_the_teacher(work: RunWork, stated: Stated, arm: str | None) -> Figure:
    """Return the rate of a training with an online teacher.

    It is that of an earlier such training, else that of a student and a teacher that take turns, else computed from the
    operations.
    """
    earlier = _earlier("train", work, [work.run.out, *stated.like], online=True)
    if earlier is not None:
        return earlier
    student, teacher = _found("train", work, stated)[0], _beside_a_student(work, stated, arm)
    if student is None or student.value is None or teacher is None or teacher.value is None:
        return _computed("train", work, stated, arm, "")
    source = f"a student at {student.value:,.0f} tokens/s ({student.source}) and the teacher at {teacher.value:,.0f}"
    return Figure(value=1 / (1 / student.value + 1 / teacher.value), source=f"{source} ({teacher.source}), in turn")


def _beside_a_student(work: RunWork, stated: Stated, arm: str | None) -> Figure | None:
    """Return the tokens/s of a teacher that only scores beside a student: stated, or its rate in the cache stage.

    The rate in the cache stage is taken for as many devices as the training has.
    """
    if stated.online_teacher_tokens_per_s is not None:
        return Figure(value=stated.online_teacher_tokens_per_s, source="stated")
    engine = _found("cache", work, stated)[0]
    of_engine, of_training = work.num_devices("cache"), work.num_devices("train", arm)
    # a teacher that is served elsewhere has no devices here
    if engine is None or engine.value is None or of_engine in (0, of_training):
        return engine
    source = f"{engine.source}, on {of_training} devices instead of {of_engine}"
    return Figure(value=engine.value * of_training / of_engine, source=source)


def _found(stage: str, work: RunWork, stated: Stated) -> tuple[Figure | None, str]:
    """Return the tokens/s as stated, measured or probed, else None and why a probe failed (empty without a probe)."""
    known = stated_or_measured(stage, work, stated)
    if known is not None:
        return known, ""
    probed = _probed(stage, work.run, [work.run.out, *stated.like])
    if probed is None or probed.value is not None:
        return probed, ""
    return None, f"{probed.source}; "


def _computed(stage: str, work: RunWork, stated: Stated, arm: str | None, why: str) -> Figure:
    """Compute the rate from the stage's operations and the device's stated speed; `why` says why a probe failed."""
    if stage == "cache" and work.run.cache.engine == "server":
        return Figure(value=None, source="give --teacher-tokens-per-s or --like RUN: the teacher is served elsewhere")
    operations, tokens = work.operations(stage, arm), work.tokens(stage, arm).value
    if stated.device_peak_tflops is None or stated.mfu is None or operations is None or not tokens:
        return Figure(value=None, source=why + _missing(stage, operations is not None, work.asks_the_teacher(arm)))
    rate = stated.device_peak_tflops * 1e12 * stated.mfu / (operations / tokens)
    source = f"{operations / tokens:.3g} operations a token at {stated.mfu:g} of {stated.device_peak_tflops:g} TFLOP/s"
    return Figure(value=rate * work.num_devices(stage, arm), source=source)


def stated_or_measured(stage: str, work: RunWork, stated: Stated) -> Figure | None:
    """Return the tokens/s that the user states or an earlier run measured; None where there is neither."""
    given = {"cache": stated.teacher_tokens_per_s, "train": stated.train_tokens_per_s}.get(stage)
    if given is not None:
        return Figure(value=given, source="stated")
    return _earlier(stage, work, [work.run.out, *stated.like])


def earlier_wall_s(stage: str, run: RunFile, folders: Iterable[str]) -> Figure | None:
    """Return the seconds that an earlier stage with the same settings took; None where there is none.

    It serves stages that do not count tokens.
    """
    wanted = run.model_dump(mode="json")
    for path, manifest in _manifests(stage, folders):
        if manifest.wall_s > 0 and _is_alike(stage, manifest.resolved, wanted):
            return Figure(value=manifest.wall_s, source=f"measured: {path.parent}, {manifest.wall_s:.0f} s")
    return None


def _missing(stage: str, counted: bool, beside: bool) -> str:
    flag = {"cache": "--teacher-tokens-per-s, ", "train": "--train-tokens-per-s, "}.get(stage, "")
    if beside:
        flag = "--train-tokens-per-s and --teacher-tokens-per-s, "
    needs = "" if counted else " (and a model and text that can be counted)"
    peak = f"--device-peak-tflops and --mfu{needs}"
    return f"give {flag}--like RUN, or {peak}, or probe it with `capgap plan --calibrate`"


def _probed(stage: str, run: RunFile, folders: Iterable[str]) -> Figure | None:
    wanted = run.model_dump(mode="json")
    for found in _calibrations(folders):
        if stage in found.tokens_per_s and _is_alike(stage, found.resolved, wanted):
            return found.tokens_per_s[stage]
    return None


def _calibrations(folders: Iterable[str]) -> Iterator[Calibration]:
    for folder in folders:
        with contextlib.suppress(OSError, ValidationError):
            yield Calibration.model_validate_json((Path(folder) / CALIBRATION_NAME).read_bytes())


def _earlier(stage: str, work: RunWork, folders: Iterable[str], online: bool = False) -> Figure | None:
    wanted = work.run.model_dump(mode="json")
    for path, manifest in _manifests(stage, folders):
        num_tokens = _tokens_of(stage, manifest)
        if not num_tokens or manifest.wall_s <= 0:
            continue
        # an arm may change `train.targets`; only the stage's own settings include the arm's changes
        if stage == "train" and (_at(manifest.settings, "train.targets") == "online") != online:
            continue
        if _is_alike(stage, manifest.resolved, wanted):
            source = f"measured: {path.parent}, {num_tokens:,} tokens in {manifest.wall_s:.0f} s, start included"
            replicas = work.run.cache.replicas if stage == "cache" else 1
            return Figure(value=num_tokens / manifest.wall_s / replicas, source=source)
    return None


def _is_alike(stage: str, resolved: Any, wanted: Any) -> bool:
    """Return whether a rate measured with the settings `resolved` may be used for the settings `wanted`."""
    return not _differing(stage, resolved, wanted)


def _differing(stage: str, resolved: Any, wanted: Any) -> list[str]:
    """Return the settings for which a rate measured with `resolved` says nothing of `wanted`."""
    return [name for name in _SAME[stage] if not _fits(name, _at(resolved, name), _at(wanted, name))]


def _fits(name: str, found: Any, wanted: Any) -> bool:
    # `auto` can be a device of either kind
    return found == wanted or (name == "device" and "auto" in (found, wanted))


def _manifests(stage: str, folders: Iterable[str]) -> Iterator[tuple[Path, Manifest]]:
    for folder in folders:
        for path in sorted(Path(folder).glob(f"{stage}/**/{MANIFEST_NAME}")):
            try:
                manifest = read_manifest(path.parent)
            except CorruptError:
                continue
            if manifest is not None and manifest.stage == stage:
                yield path, manifest


def _all_manifests(folder: str) -> Iterator[tuple[Path, Manifest]]:
    """Yield the manifests of the folder's stages whose rates another run may use."""
    for stage in _SAME:
        yield from _manifests(stage, [folder])


def _tokens_of(stage: str, manifest: Manifest) -> int:
    if stage == "eval":
        # every model scores every label once
        return int(manifest.totals.get("labels", 0)) * int(manifest.totals.get("models", 0))  # type: ignore[arg-type]
    return int(manifest.totals.get("num_tokens", 0))  # type: ignore[arg-type]


def _at(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
