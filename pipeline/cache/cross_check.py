"""Compare vLLM with transformers before the first shard: do both compute the same teacher?

    transformers in float32 -----------> label logprobs --+--> own_rms_nats: the effect of rounding
    transformers in the cache's dtype -> label logprobs --+
    vLLM, which scores the cache ------> label logprobs -----> rms_nats, the distance from float32

Only one copy of the teacher is on the device at a time: both models of transformers are gone before vLLM starts. The
sequences are the first of the cache, uncut, so that sliding-window attention and stretched rotary embeddings take part.

Two sound engines in one dtype are about equally far from float32, since rounding is the only error of both: vLLM may be
four times as far. In float32 there is no such distance to compare with. Therefore 1e-3 nats are always allowed: a
divergence of 5e-7 nats/token, which does not matter to a student. Nearly all models of docs/architectures.md are 1e-5
nats apart in float32, and one is 5e-4; engines that disagree about an attention window are 0.1 nats apart.

The result is kept in the work folder, so that a restarted stage or another slice does not compare again.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from capgap.pipeline.cache.scoring import Engine, Recording, Request
from capgap.pipeline.cache.shards import CacheJob, ShardScorer
from capgap.pipeline.cache.transformers_engine import TransformersEngine
from capgap.pipeline.models.configs import empty_model, load_config
from capgap.pipeline.models.contents import first_line
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.heartbeat import begin_phase
from capgap.pipeline.store.locks import ProcessLock
from capgap.pipeline.store.sidecars import read_sidecar, write_sidecar
from capgap.pipeline.train.fits import free_bytes
from capgap.schemas.facts import CrossCheck

CROSS_CHECK_NAME = "cross_check.json"
FACTOR = 4.0
FLOOR_NATS = 1e-3

_NUM_SEQUENCES, _NUM_TOKENS, _LONGEST = 4, 4096, 8192
_DTYPES = ("float32", "bfloat16", "float16")
_BATCH_TOKENS, _CHUNK_ROWS = 2048, 256
# factor on the size of the weights that leaves room for activations and the logits of a chunk
_ROOM = 1.2

Labels = npt.NDArray[np.float64]


class CheckedShardScorer(ShardScorer):
    """A scorer of shards that compares vLLM with transformers when the teacher starts, if no process did so before."""

    def _start(self) -> Engine:
        return start_cross_checked(self.job, super()._start, self.first_requests)


def start_cross_checked(
    job: CacheJob, start: Callable[[], Engine], first_requests: Callable[[int], list[Request]]
) -> Engine:
    """Start a cache's engine, and compare vLLM with transformers if no process has done so for this cache.

    Args:
        job: the cache's job.
        start: function that starts the engine.
        first_requests: function that returns the requests for the given number of first sequences of the cache.

    Raises:
        CapgapError: as the engine. A failure of transformers is no error: it is logged, and kept as `skipped`.
    """
    path = job.work / CROSS_CHECK_NAME
    if job.settings.engine != "vllm" or job.settings.cross_check == "never" or path.is_file():
        return start()
    with ProcessLock(path.with_suffix(".lock")) as lock:
        if not lock.exclusive() or path.is_file():
            return start()  # another process compares now, or has done so meanwhile
        requests = _cut(first_requests(min(max(1, _NUM_TOKENS // job.source.seq_len), _NUM_SEQUENCES)))
        values = _by_transformers(job, requests)
        engine = start()
        begin_phase("compares vLLM with transformers on a few sequences")
        try:
            found = values if isinstance(values, CrossCheck) else compared(*values, _labels(engine, requests))
        except BaseException:
            engine.close()
            raise
        write_sidecar(path, found)
    level = logging.WARNING if found.differs else logging.INFO
    figures = {"rms_nats": found.rms_nats, "allowed_nats": found.allowed_nats}
    event("cross_check", f"cache: {found.sentence}", level, differs=found.differs, **figures)
    return engine


def read_cross_check(work: Path) -> CrossCheck | None:
    """Return the result of the comparison, by whichever process; None where nothing was compared."""
    return read_sidecar(work / CROSS_CHECK_NAME, CrossCheck)


def needed_bytes(job: CacheJob) -> int:
    """Return the bytes that the teacher takes on a device in float32: its weights, and the engine's copy of its head.

    Raises:
        InputError: transformers cannot make this model.
    """
    model = empty_model(load_config(job.teacher, job.trust_remote_code), job.trust_remote_code)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    return int(_ROOM * 4 * (num_weights + model.get_output_embeddings().weight.numel()))


def compared(dtype: str, exact: Labels, own: Labels, found: Labels) -> CrossCheck:
    """Compare three arrays of logprobs of the same labels.

    Args:
        dtype: the cache's dtype.
        exact: logprobs by transformers in float32.
        own: logprobs by transformers in the cache's dtype.
        found: logprobs by vLLM.
    """
    own_nats = _rms(own - exact)
    return CrossCheck(
        num_labels=len(found),
        dtype=dtype,
        rms_nats=_rms(found - exact),
        own_rms_nats=own_nats,
        allowed_nats=max(FACTOR * own_nats, FLOOR_NATS),
    )


def _by_transformers(job: CacheJob, requests: Sequence[Request]) -> tuple[str, Labels, Labels] | CrossCheck:
    """Return the cache's dtype and the labels' logprobs in float32 and in that dtype; or why they were skipped."""
    try:
        config = load_config(job.teacher, job.trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            return CrossCheck(skipped="the teacher is quantised")
        saved = str(config.get_text_config().dtype).removeprefix("torch.")
        dtype = saved if job.settings.dtype == "auto" else job.settings.dtype
        if dtype not in _DTYPES:
            return CrossCheck(skipped=f"its weights are of type {dtype}")
        needed = needed_bytes(job)
        if needed > (free := free_bytes(job.device)):
            return CrossCheck(
                skipped=f"the teacher takes {needed / 2**30:.3g} GiB in float32, and {free / 2**30:.3g} GiB are free"
            )
        exact = _labels_in("float32", job, requests)
        return dtype, exact, exact if dtype == "float32" else _labels_in(dtype, job, requests)
    except Exception as error:  # the cache itself does not need transformers, so it is made anyway
        return CrossCheck(skipped=f"transformers failed: {first_line(error)[:300]}")


def _labels_in(dtype: str, job: CacheJob, requests: Sequence[Request]) -> Labels:
    recording = Recording(0, 1, job.settings.temperature, job.settings.seed, job.vocab_size, _CHUNK_ROWS)
    engine = TransformersEngine(job.teacher, recording, dtype, _BATCH_TOKENS, job.device, job.trust_remote_code)
    try:
        return _labels(engine, requests)
    finally:
        engine.close()
        del engine
        gc.collect()
        if job.device != "cpu":
            torch.cuda.empty_cache()


def _labels(engine: Engine, requests: Sequence[Request]) -> Labels:
    return np.concatenate([scored.label_logprobs_L for scored in engine.score(requests)]).astype(np.float64)


def _cut(requests: Sequence[Request]) -> list[Request]:
    """Cut each request to `_LONGEST` targets, which bounds the cost of the comparison."""
    return [Request(one.tokens_L1[: _LONGEST + 1], one.key) for one in requests]


def _rms(differences: Labels) -> float:
    return float(np.sqrt((differences**2).mean()))
