"""Chooses the caches of a training, a recording and a temperature of each, and checks that they fit the student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from capgap.pipeline.stage.context import Instance, StageInput, further_cache
from capgap.pipeline.stage.rounds import replayed, rounds_of
from capgap.pipeline.store import ShardReader, target_temperature_of
from capgap.pipeline.store.rows import sequences_per_row
from capgap.pipeline.train.objective import objective_of, require_projected
from capgap.pipeline.train.task import CacheSource
from capgap.schemas.errors import InputError, MismatchError, SettingError
from capgap.schemas.facts import CacheFacts, ModelFacts
from capgap.schemas.manifest import ShardSet
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_needs import require_chunks
from capgap.schemas.run_train import FurtherCache, TrainSettings

CHUNKS_TEMPERATURE = 100.0
"""The default temperature for an aligned cache. The likelihood of a whole chunk is close to 0, and at temperature 1 a
loss would learn from little but the chunks of which the teacher is certain: benchmarks/align_quality.py has figures."""


@dataclass(frozen=True)
class ChosenCache:
    """One cache of a training.

    Attributes:
        setting: The setting of the run file that names the cache, for error messages.
        location: The folder or URL of the cache.
        facts: The facts in its manifest.
        recording: The recording that is read.
        temperature: The temperature at which teacher and student are compared.
        shards: The shards of that recording.
        weight: The cache's share of the steps, relative to the weights of the others.
    """

    setting: str
    location: Path | str
    facts: CacheFacts
    recording: RecordingName
    temperature: float
    shards: ShardSet
    weight: float

    @property
    def has_targets(self) -> bool:
        """Whether the cache has targets at this temperature. It may have none where the teacher is asked online."""
        return self.of_chunks or self.temperature in self.facts.recordings[self.recording].temperatures

    @property
    def of_chunks(self) -> bool:
        """Whether the align stage made this cache."""
        return self.recording == "chunks"

    def source(self) -> CacheSource:
        """Open the cache for the loader.

        Raises:
            InputError: The shards cannot be opened.
        """
        reader = ShardReader(self.location, self.shards)
        target_temperature = None
        if self.has_targets and not self.of_chunks:
            target_temperature = target_temperature_of(reader.codec, self.facts.temperature, self.temperature)
        return CacheSource(reader, self.weight, self.facts.context, target_temperature)


def chosen_caches(settings: TrainSettings, inputs: Mapping[str, StageInput]) -> dict[str | None, ChosenCache]:
    """Return the caches of a training: the run's own cache under None, and further caches by their names.

    Raises:
        SettingError: A cache lacks the recording or the temperature, or has several recordings and none is named.
    """
    own = _chosen("train", inputs["cache"], settings, settings.own_weight)
    found: dict[str | None, ChosenCache] = {None: own}
    for name, cache in settings.caches.items():
        # All caches are read at one temperature: at several, divergences of different scales would be added up.
        asked = settings.model_copy(update={"recording": cache.recording, "temperature": _shared(settings, own)})
        made = inputs["cache" if cache.path is None else further_cache(name)]
        found[name] = _chosen(f"train.caches.{name}", made, asked, cache.weight)
    return found


def with_replay(run: RunFile, instance: Instance) -> TrainSettings:
    """Return the settings of a training, with the caches of the earlier rounds that it replays as further caches."""
    assert instance.arm is not None
    settings = run.train_settings(instance.arm, instance.round)
    earlier = [] if instance.round is None else list(replayed(run, instance))
    if not earlier:
        return settings
    share = rounds_of(run).replay
    others = settings.own_weight + sum(cache.weight for cache in settings.caches.values())
    each = others * share / (1 - share) / len(earlier)
    caches = {name: FurtherCache(path=name, weight=each, recording=settings.recording) for name in earlier}
    return settings.model_copy(update={"caches": {**settings.caches, **caches}})


def require_fit(settings: TrainSettings, caches: Mapping[str | None, ChosenCache], student: StageInput) -> None:
    """Refuse caches on which this student cannot be trained, or which cannot be mixed with one another.

    Raises:
        MismatchError: A cache has another tokenizer than the student, or a recording lacks what the loss needs.
        InputError: Sequences are longer than the student takes, or there are fewer than one step needs.
        SettingError: Sequences do not fit into rows of one length, or only some of the caches are aligned, or an
            aligned cache does not support a setting.
    """
    _require_one_kind(caches)
    for cache in caches.values():
        if cache.of_chunks:
            _require_chunks(settings, cache)
            require_projected(settings, cache.facts.recordings["chunks"].num_ids, cache.location)
        _require_same_tokenizer(cache, student)
        _require_positions(cache, student)
        objective_of(settings, cache.recording, cache.location)
    _require_rows(settings, caches)
    own = _per_row(settings, caches[None])
    for cache in caches.values():
        _require_a_step(cache, settings.batch_sequences // own * _per_row(settings, cache))


def choose(cache: CacheFacts, settings: TrainSettings, setting: str = "train") -> tuple[RecordingName, float]:
    """Choose the recording of a cache and the temperature to train with.

    Args:
        cache: The facts of the cache.
        settings: The settings that ask for a recording and a temperature, or leave them out.
        setting: The name of the setting that asks, for error messages.

    Raises:
        SettingError: The cache lacks the recording or the temperature, or has several recordings and none is named.
    """
    known = sorted(cache.recordings)
    recording = settings.recording
    if recording is None and not settings.needs_targets:
        # Only the text is read, and it is the same in every recording.
        recording = known[0]
    if recording is None and len(known) == 1:
        recording = known[0]
    if recording is None or recording not in cache.recordings:
        raise SettingError(
            "the cache has several recordings" if recording is None else "the cache has no such recording",
            where=f"{setting}.recording",
            found="none named" if recording is None else recording,
            expected=f"{'one of ' if len(known) > 1 else ''}{', '.join(known)}",
            fix=f"set {setting}.recording{'' if len(known) > 1 else ', or leave it out'}",
        )
    if recording == "chunks":
        return recording, settings.temperature or CHUNKS_TEMPERATURE
    temperature = cache.temperature if settings.temperature is None else settings.temperature
    temperatures = cache.recordings[recording].temperatures
    if settings.needs_targets and temperature not in temperatures:
        raise SettingError(
            f"the cache's recording {recording} has no targets at this temperature",
            where=f"{setting}.temperature" if setting in ("train", "tune") else setting,
            found=f"{temperature:g}",
            expected=f"{'one of ' if len(temperatures) > 1 else ''}{', '.join(f'{one:g}' for one in temperatures)}",
            fix="leave it out, or make a topk cache with it in cache.extra_temperatures"
            if setting in ("train", "tune")
            else "set train.temperature to one that all caches have, or make a topk cache with it",
        )
    return recording, temperature if settings.needs_targets or settings.needs_teacher else cache.temperature


def _require_one_kind(caches: Mapping[str | None, ChosenCache]) -> None:
    """Raise SettingError if only some of the caches are aligned, because losses of the two kinds differ in scale."""
    kinds = {cache.of_chunks for cache in caches.values()}
    if len(kinds) > 1:
        aligned = next(cache for cache in caches.values() if cache.of_chunks)
        raise SettingError(
            "an aligned cache beside one that is not",
            where=f"{aligned.setting}: {aligned.location}",
            found="chunks beside tokens",
            expected="caches of one kind",
            fix="train on one kind after the other",
        )


def _require_chunks(settings: TrainSettings, cache: ChosenCache) -> None:
    """Raise SettingError for a setting that an aligned cache does not support."""
    try:
        require_chunks(cache.setting, settings)
        if settings.decode == "device":
            raise ValueError(f"{cache.setting}.decode: found device with chunks, expected host")
        if settings.strategy == "fsdp2":
            raise ValueError(f"{cache.setting}.strategy: found {settings.strategy} with chunks, expected ddp")
    except ValueError as error:
        raise SettingError(
            "an aligned cache does not support this setting", where=cache.location, found=error
        ) from None


def _chosen(setting: str, cache: StageInput, settings: TrainSettings, weight: float) -> ChosenCache:
    facts = CacheFacts.model_validate(cache.manifest.facts)
    recording, temperature = choose(facts, settings, setting)
    shards = cache.manifest.shard_sets[recording]
    return ChosenCache(setting, cache.location, facts, recording, temperature, shards, weight)


def _shared(settings: TrainSettings, own: ChosenCache) -> float | None:
    return own.temperature if settings.needs_targets else None


def _require_same_tokenizer(cache: ChosenCache, student: StageInput) -> None:
    found = ModelFacts.model_validate(student.manifest.facts)
    if found.tokenizer.fingerprint != cache.facts.tokenizer.fingerprint:
        raise MismatchError(
            "cache and student have different tokenizers",
            where=student.path if cache.setting == "train" else f"{cache.setting}: {cache.location}",
            found=f"fingerprint {found.tokenizer.fingerprint[:12]} at the student",
            expected=f"{cache.facts.tokenizer.fingerprint[:12]}, the cache's",
            fix="train a student of the cache's tokenizer, or make a cache of this corpus",
        )


def _require_positions(cache: ChosenCache, student: StageInput) -> None:
    most = ModelFacts.model_validate(student.manifest.facts).max_positions
    if most is not None and cache.shards.seq_len > most:
        raise InputError(
            "the student takes shorter sequences than the cache has",
            where=f"{cache.setting}: {cache.location}",
            found=f"sequences of {cache.shards.seq_len} targets",
            expected=f"at most {most}, the student's positions",
            fix="make the cache of a corpus with a smaller seq_len, or train a student with more positions",
        )


def _require_rows(settings: TrainSettings, caches: Mapping[str | None, ChosenCache]) -> None:
    own = caches[None]
    for cache in caches.values():
        length = cache.shards.seq_len
        if settings.row_len is None and length != own.shards.seq_len:
            raise SettingError(
                "caches with sequences of different lengths need rows of one length",
                where=f"{cache.setting}: {cache.location}",
                found=f"sequences of {length} targets beside {own.shards.seq_len}",
                expected="train.row_len",
                fix=f"set train.row_len to {max(length, own.shards.seq_len)} or more",
            )
        if settings.row_len is not None and length > settings.row_len:
            raise SettingError(
                "a row is shorter than a sequence",
                where="train.row_len",
                found=settings.row_len,
                expected=f"at least {length}, the targets of a sequence of {cache.location}",
            )
    if settings.micro_batch % _per_row(settings, own):
        raise SettingError(
            "a micro-batch does not fill its rows",
            where="train.row_len",
            found=f"{settings.micro_batch} sequences a micro-batch, {_per_row(settings, own)} a row",
            expected=f"a multiple of {_per_row(settings, own)}",
            fix="use another train.micro_batch_sequences, train.batch_sequences or train.row_len",
        )


def _per_row(settings: TrainSettings, cache: ChosenCache) -> int:
    return 1 if settings.row_len is None else sequences_per_row(settings.row_len, cache.shards.seq_len)


def _require_a_step(cache: ChosenCache, needed: int) -> None:
    if cache.shards.num_sequences < needed:
        raise InputError(
            "the cache has fewer sequences than a step" if cache.shards.num_sequences else "the cache is empty",
            where=f"{cache.setting}: {cache.location}",
            found=f"{cache.shards.num_sequences} sequences",
            expected=f"at least {needed}",
            fix="make a larger cache, or lower train.batch_sequences",
        )
