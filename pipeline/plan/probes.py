"""Probe a stage in a process of its own: its own engine, loader, loss and optimizer run for some seconds.

The smallest amount of work is done once to warm up, which compiles kernels and allocates memory. Then the amount is
doubled until the next one would not fit into the time, and the rate of the last one counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from capgap.pipeline.cache.shards import ShardScorer
from capgap.pipeline.plan.probe_data import RandomScorer, random_tokens, scratch_job
from capgap.pipeline.plan.probe_models import random_model, student_to_probe, teacher_folder, teacher_to_probe
from capgap.pipeline.stage.manifests import finished_cache
from capgap.pipeline.stages import run_file_type
from capgap.pipeline.store import Batch, LoaderSettings, SequenceLoader, ShardReader, target_temperature_of
from capgap.pipeline.store.batch import TargetTemperature
from capgap.pipeline.train.attention import require_ending_attention
from capgap.pipeline.train.caches import choose
from capgap.pipeline.train.fits import require_memory
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.objective import Objective, objective_of
from capgap.schemas.errors import InputError
from capgap.schemas.facts import CacheFacts
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_corpus import ContextRule
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_optimization import OptimizationSettings
from capgap.schemas.run_train import TrainSettings

# A shard is scored as one submission; a submission of more tokens than this would not make the rate more exact.
_MOST_TOKENS = 1 << 21
_MOST_MICRO_BATCHES = 64
_WITHOUT_END = 1 << 32


@dataclass(frozen=True)
class Probe:
    """What a process must know to probe, in plain values that can be pickled.

    Attributes:
        run: The run file, as JSON.
        device: The device, such as `cpu` or `cuda:0`.
        scratch: An empty folder, which the caller removes.
        vocab_size: Size of the tokenizer's vocabulary.
        seq_len: Number of targets in a sequence.
        budget_s: Seconds of measuring for each rate.
        teacher: Folder of a finished teacher stage; None where there is none.
        cache: Folder or URL of a finished cache; None where there is none.
    """

    run: str
    device: str
    scratch: Path
    vocab_size: int
    seq_len: int
    budget_s: float
    teacher: str | None = None
    cache: str | None = None


@dataclass(frozen=True)
class Rate:
    """How many tokens were processed, and in how many seconds."""

    num_tokens: int
    took_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens processed per second."""
        return self.num_tokens / self.took_s


def cache_rates(probe: Probe) -> dict[str, Rate]:
    """Measure `cache`, the rate of one engine that scores, encodes and writes shards.

    Raises:
        CapgapError: An error of the engine.
    """
    run = _run(probe)
    most = max(1, min(run.corpus.sequences_per_shard, _MOST_TOKENS // probe.seq_len))
    sizes = _doubled(most)
    teacher = teacher_folder(run, probe.teacher, probe.scratch / "teacher", probe.vocab_size)
    shards = [random_tokens(size, probe.seq_len, probe.vocab_size) for size in sizes]
    scorer = ShardScorer(scratch_job(run, probe.scratch, probe.device, probe.vocab_size, teacher, shards))
    scorer.start()
    try:

        def made(size: int) -> int:
            return scorer.write(scorer.score(sizes.index(size))).facts.num_targets

        return {"cache": rate_within(sizes, made, probe.budget_s)}
    finally:
        scorer.close()


def student_rates(probe: Probe) -> dict[str, Rate]:
    """Measure a student's rates: `train`, its training with the cache's targets, and `student`, its forward pass.

    Raises:
        CapgapError: The training is refused, or is of a kind that is not probed.
    """
    run = _run(probe)
    settings = max((run.train_settings(arm) for arm in run.arms), key=lambda one: one.largest_alpha)
    if settings.needs_teacher:
        raise InputError("a teacher beside its student is not probed", where="train.targets", found="online")
    if run.makes("align"):
        raise InputError("a student of another tokenizer is not probed", where="align")
    config = student_to_probe(run, probe.teacher, probe.vocab_size)
    work = _Training(probe, config, settings, run.student.trust_remote_code)
    reader, name, captured, context = _targets(probe, run, settings)
    work.temperature = captured if settings.temperature is None else settings.temperature
    work.objective, work.alpha = objective_of(settings, name, "the cache"), settings.largest_alpha
    target = target_temperature_of(reader.codec, captured, work.temperature)
    loader = work.loader(reader, target, replace(_LOADER, row_len=settings.row_len, context=context))
    return {"train": work.step_rate(loader), "student": work.forward_rate(loader)}


def _targets(
    probe: Probe, run: RunFile, settings: TrainSettings
) -> tuple[ShardReader, RecordingName, float, ContextRule]:
    """Return a reader of targets, with their recording, temperature and context rule.

    The targets are those of the finished cache, or of one random sequence, recorded as the run would record it.
    """
    if probe.cache is not None:
        place, manifest = finished_cache(probe.cache)
        facts = CacheFacts.model_validate(manifest.facts)
        name, _ = choose(facts, settings)
        return ShardReader(place, manifest.shard_sets[name]), name, facts.temperature, facts.context
    tokens_BL1 = np.repeat(random_tokens(1, probe.seq_len, probe.vocab_size), settings.micro_batch, axis=0)
    job = scratch_job(run, probe.scratch, "cpu", probe.vocab_size, "", [tokens_BL1])
    name = settings.recording or run.cache.recordings[0]
    return RandomScorer(job).reader(name), name, run.cache.temperature, job.context


def teacher_rates(probe: Probe) -> dict[str, Rate]:
    """Measure a teacher's rates: `teacher`, its training on text if the run has one, and `forward`, its forward pass.

    Raises:
        CapgapError: The training is refused.
    """
    run = _run(probe)
    trained = run.teacher.optimization if probe.teacher is None else None
    settings = trained or OptimizationSettings(batch_sequences=1)
    config = teacher_to_probe(run, probe.teacher, probe.vocab_size)
    work = _Training(probe, config, settings, run.teacher.trust_remote_code, is_trained=trained is not None)
    tokens_BL1 = random_tokens(settings.micro_batch, probe.seq_len, probe.vocab_size)
    job = scratch_job(run, probe.scratch, "cpu", probe.vocab_size, "", [tokens_BL1])
    loader = work.loader(ShardReader(job.corpus, job.source), None, _LOADER)
    return ({"teacher": work.step_rate(loader)} if trained else {}) | {"forward": work.forward_rate(loader)}


def rate_within(
    sizes: Sequence[int],
    work: Callable[[int], int],
    budget_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Rate:
    """Return the rate of the largest amount of work that the time allows.

    Args:
        sizes: Amounts of work, each twice the one before.
        work: Does an amount of work, and returns its number of tokens.
        budget_s: Seconds for all amounts together. The first is always done, after a warm-up that is not counted.
        clock: Returns the time in seconds.
    """
    work(sizes[0])
    started = clock()
    rates = []
    for size in sizes:
        begun = clock()
        num_tokens = work(size)
        now = clock()
        rates.append(Rate(num_tokens, max(now - begun, 1e-9)))
        if now - started + 2 * rates[-1].took_s > budget_s:
            break
    return rates[-1]


_LOADER = LoaderSettings(1, 0, num_epochs=_WITHOUT_END)


class _Training:
    """A model on its device with its optimizer, trained as Lightning trains it and measured as eval measures it."""

    def __init__(
        self, probe: Probe, config: object, settings: OptimizationSettings, trusted: bool, is_trained: bool = True
    ) -> None:
        self._probe, self._settings = probe, settings
        dtype = torch.bfloat16 if settings.precision == "bf16-true" else torch.float32
        if not is_trained:
            dtype = getattr(config, "dtype", None) or torch.float32
        self._model = random_model(config, probe.device, dtype, trusted)
        if is_trained:
            require_memory(self._model, settings, probe.device, probe.seq_len)
        self.objective, self.alpha, self.temperature = Objective(), 0.0, 1.0

    def loader(self, reader: ShardReader, target: TargetTemperature | None, settings: LoaderSettings) -> SequenceLoader:
        """Return a loader whose micro-batches never end."""
        size = self._settings.micro_batch
        on_device = self._probe.device if self._settings.decode == "device" else None
        if settings.row_len is not None or settings.context == "document":
            require_ending_attention(self._model, settings.row_len or self._probe.seq_len)
        mine = replace(settings, batch_sequences=size, micro_batch=size, decode_on=on_device, target_temperature=target)
        return SequenceLoader(reader, mine)

    def step_rate(self, loader: SequenceLoader) -> Rate:
        """Measure whole steps: forward and backward passes of a step's micro-batches, then the optimizer's update."""
        module, settings = self._module(), self._settings
        optimizer = module.configure_optimizers()["optimizer"]
        accumulate = settings.batch_sequences // settings.micro_batch
        batches = iter(loader)

        def trained(num_batches: int) -> int:
            num_tokens = 0
            for number in range(1, num_batches + 1):
                batch = next(batches).to(self._probe.device)
                with self._arithmetic():
                    loss = module.loss(batch, self.alpha).loss
                (loss / accumulate).backward()  # type: ignore[no-untyped-call]
                num_tokens += batch.num_tokens
                if number % accumulate == 0 or number == num_batches:
                    module.configure_gradient_clipping(optimizer)
                    optimizer.step()
                    optimizer.zero_grad()
            self._settle()
            return num_tokens

        try:
            module.train()
            return rate_within(_doubled(max(accumulate, _MOST_MICRO_BATCHES)), trained, self._probe.budget_s)
        finally:
            batches.close()

    def forward_rate(self, loader: SequenceLoader) -> Rate:
        """Measure forward passes, with the losses that eval computes."""
        module, batches = self._module().eval(), cycle([next(iter(loader))])

        @torch.no_grad()
        def measured(num_batches: int) -> int:
            num_tokens = 0
            for _ in range(num_batches):
                batch: Batch = next(batches).to(self._probe.device)
                with self._arithmetic():
                    module.loss(batch, self.alpha)
                num_tokens += batch.num_tokens
            self._settle()
            return num_tokens

        return rate_within(_doubled(_MOST_MICRO_BATCHES), measured, self._probe.budget_s)

    def _module(self) -> DistillationModule:
        module = DistillationModule(
            self._model, self._settings, 1, self.alpha, self.temperature, self._probe.vocab_size, self.objective
        )
        module.to(self._probe.device)
        module.on_fit_start()
        return module

    def _arithmetic(self) -> torch.autocast | nullcontext[None]:
        if self._settings.precision != "bf16-mixed":
            return nullcontext()
        return torch.autocast(torch.device(self._probe.device).type, torch.bfloat16)

    def _settle(self) -> None:
        if self._probe.device != "cpu":
            torch.cuda.synchronize()


def _run(probe: Probe) -> RunFile:
    return run_file_type().model_validate_json(probe.run)


def _doubled(most: int) -> list[int]:
    """Return the powers of two from 1 up to `most`."""
    return [1 << power for power in range(most.bit_length())]
