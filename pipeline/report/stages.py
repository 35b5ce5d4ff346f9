"""The page's table of stages: tokens, time, throughput and device hours of each stage."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import median

from capgap.pipeline.report.summary import StageLine
from capgap.pipeline.stage.context import StageInput
from capgap.pipeline.stage.scalars import METRICS_NAME
from capgap.pipeline.stages import stage_named
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

STAGE_HEADINGS = ("stage", "time", "tokens", "tokens/s", "step tokens/s", "device hours", "identity", "content")


def stage_line(stage: StageInput, run: RunFile) -> StageLine:
    """Collect the facts of a finished stage from its manifest and its metrics."""
    manifest = stage.manifest
    return StageLine(
        instance=manifest.instance,
        identity=manifest.identity,
        content=manifest.content,
        wall_s=manifest.wall_s,
        versions=manifest.versions,
        num_tokens=_num_tokens(manifest),
        steps_tokens_per_s=None if stage.is_remote else _of_steps(stage.path / METRICS_NAME),
        num_devices=_num_devices(manifest, run),
    )


def stage_row(line: StageLine) -> tuple[str, ...]:
    """Format the facts of a stage as one text for each of `STAGE_HEADINGS`."""
    return (
        line.instance,
        duration(line.wall_s),
        "-" if line.num_tokens is None else f"{line.num_tokens:,}",
        _rate(line.tokens_per_s),
        _rate(line.steps_tokens_per_s),
        _hours(line.device_s) if line.num_devices else "-",
        line.identity[:12],
        line.content[:12] or "-",
    )


def total_line(lines: tuple[StageLine, ...]) -> str:
    """Return a sentence with the time and the device hours of all stages together."""
    wall_s, device_s = sum(line.wall_s for line in lines), sum(line.device_s for line in lines)
    return f"all stages: {duration(wall_s)}, with {_hours(device_s)} device hours of models on devices"


def duration(seconds: float) -> str:
    """Format a number of seconds as `3.2 s`, `12 min 5 s` or `2 h 3 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _num_tokens(manifest: Manifest) -> int | None:
    totals = manifest.totals
    if manifest.stage == "corpus":
        return sum(shards.num_tokens for shards in manifest.shard_sets.values())
    if manifest.stage == "eval":
        return _product(totals.get("labels"), totals.get("models"))
    found = [totals.get(name) for name in ("num_tokens", "num_heldout_tokens")]
    counts = [count for count in found if isinstance(count, int)]
    return sum(counts) if counts else None


def _product(first: object, second: object) -> int | None:
    return first * second if isinstance(first, int) and isinstance(second, int) else None


def _of_steps(metrics: Path) -> float | None:
    """Return the median throughput of a training's logged steps in tokens/s; None where it logged none."""
    if not metrics.is_file():
        return None
    with metrics.open(newline="") as file:
        rates = [float(rate) for row in csv.DictReader(file) if (rate := row.get("tokens_per_s"))]
    rates = [rate for rate in rates if math.isfinite(rate)]
    return median(rates) if rates else None


def _num_devices(manifest: Manifest, run: RunFile) -> int:
    stage, *rest = manifest.instance.split("/")
    if not stage_named(stage).on_device:
        return 0
    if stage == "cache":
        return run.cache.num_devices * run.cache.replicas
    if stage == "generate" and run.rounds is not None:
        # in a round, the student writes on one device of each replica; only the teacher is spread over several
        return run.rounds.replicas * (run.rounds.tensor_parallel if rest[0].startswith("round-") else 1)
    if stage == "train":
        return run.train_settings(rest[0]).num_devices
    if stage == "teacher":
        return 1 if run.teacher.optimization is None else run.teacher.optimization.num_devices
    return run.tune.num_devices if stage == "tune" and run.tune is not None else 1


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.0f}"


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.4f}" if hours < 1 else f"{hours:,.2f}"
