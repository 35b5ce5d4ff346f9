"""Names of the values that a stage logs as it runs: one table for metrics.csv, TensorBoard and every other logger.

    teacher, train, tune: rows of metrics.csv and scalars of the training's loggers
    cache, eval:          scalars of TensorBoard, in the stage's folder `logs`

A name means one thing in every stage, so that curves of different stages can be laid over one another.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

METRICS_NAME = "metrics.csv"

TRAINING_SCALARS = {
    "epoch": "passes over the training text",
    "num_tokens": "tokens seen",
    "train_loss": "what is minimised, nats/token, mean since the row before",
    "train_kl": "divergence from the teacher that alpha weighs, nats/token",
    "train_ce": "cross-entropy with the text, nats/token",
    "validation_loss": "cross-entropy with held-out text, nats/token",
    "heldout_kl": "divergence from the teacher on held-out text, nats/token; of a topk cache",
    "heldout_teacher_ce": "cross-entropy with the teacher's samples on held-out text, nats/token; of a sampled cache",
    "heldout_top1": "top-1 agreement: share of held-out tokens at which student and teacher have the same top-1 token",
    "ratio_mean": "student's probability over the writer's, mean over held-out text that a student of the run wrote",
    "ratio_p5": "5 % of these ratios are lower",
    "ratio_median": "their median",
    "ratio_p95": "5 % of them are higher",
    "ratio_outside": "share of them farther from 1 than train.ratio_clip, or 0.2",
    "ratio_effective": "effective sample size of that text over its tokens",
    "heldout_s": "seconds that this measurement of held-out text took, which no other figure counts",
    "learning_rate": "learning rate of the step",
    "gradient_norm": "norm of the gradient before clipping, mean since the row before",
    "tokens_per_s": "tokens a second",
    "data_wait_fraction": "data-wait fraction: the part of the time in which the loader was waited for",
    "memory_bytes": "largest memory that tensors took of a GPU; on a CPU the memory of the process",
}
"""Scalars of the stages that train, by step; the columns of metrics.csv behind `step`, in their order."""

CACHE_SCALARS = {
    "num_shards": "shards that are finished",
    "num_tokens": "tokens scored by this process",
    "tokens_per_s": TRAINING_SCALARS["tokens_per_s"],
    "bytes_per_token": "bytes on disk for a token of the shard",
    "memory_bytes": "memory of a GPU that all processes take; on a CPU the memory of the process",
}
"""Scalars of the cache stage, by number of finished shards."""

EVAL_SCALARS = {name: TRAINING_SCALARS[name] for name in ("validation_loss", "heldout_kl", "heldout_top1")}
"""Scalars of the eval stage, in a TensorBoard run for each model; compared with the teacher's whole distribution."""


class ScalarFile:
    """A TensorBoard run of a stage that is no training; each call is on disk when it returns.

    A value that cannot be written does not stop the stage: if the disk is full, the stage reports that itself.

    Args:
        folder: Folder of the run; files of earlier processes in it are continued.
        known: Table that the names must be in.
    """

    def __init__(self, folder: Path, known: dict[str, str]) -> None:
        self._known = known
        # TensorBoard recognizes its files by this name
        self._path = folder / f"events.out.tfevents.{time.time_ns()}.{os.uname().nodename}.{os.getpid()}"

    def add(self, step: int, values: dict[str, float | None]) -> None:
        """Write values at a step, by their names; values that are None are left out."""
        # imported here, because code that only looks at a run needs the names alone
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert values.keys() <= self._known.keys(), values.keys() - self._known.keys()
        said = [Summary.Value(tag=name, simple_value=value) for name, value in values.items() if value is not None]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=said))
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                RecordWriter(file).write(event.SerializeToString())
