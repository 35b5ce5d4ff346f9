"""`capgap plan --calibrate`: probe for a minute to find the rates that are neither stated nor measured.

    rates that are not stated or measured --probes.py, one process per model--> tokens/s --> calibration.json in the
    run's folder, which later plans of this run read, and plans of other runs with --like and this run's folder

Each model has its own process, whose end certainly frees the device's memory. The device's lease is held meanwhile.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import torch

from capgap.pipeline.plan.probes import Probe, Rate, cache_rates, student_rates, teacher_rates
from capgap.pipeline.plan.rates import CALIBRATION_NAME, STAGES_WITH_A_RATE, Stated, stated_or_measured
from capgap.pipeline.plan.work import RunWork, finished, work_of
from capgap.pipeline.stage.device import devices_from, machine_kind, resolve_device
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.lease import cpu_group, leases
from capgap.pipeline.stage.orphans import die_with
from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.workflow.state import StageState, State, states
from capgap.schemas.errors import CapgapError, InputError
from capgap.schemas.plan import Calibration, Figure
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_sections import ReusableStage
from capgap.schemas.secrets import redacted_values

BUDGET_S = 60.0
"""Seconds of measuring for all rates together; loading each model and its first batch come on top."""

_PROBES: dict[str, Callable[[Probe], dict[str, Rate]]] = {
    "cache": cache_rates,
    "student": student_rates,
    "teacher": teacher_rates,
}


def calibrate(
    run: RunFile, stated: Stated, *, text_bytes_per_token: float | None = None, budget_s: float = BUDGET_S
) -> Calibration | None:
    """Probe the rates that are neither stated nor measured, and write them to the run's folder.

    Args:
        run: The run file.
        stated: Speeds that the user states, which are not probed.
        text_bytes_per_token: Bytes of text in a token, where the corpus is not made; None to measure it on a sample.
        budget_s: Seconds of measuring for all rates together.

    Returns:
        The calibration that was written; None where every rate is known.

    Raises:
        InputError: The vocabulary is not known, so that no model can be made.
        MachineError: There is no such device.
    """
    known = states(run)
    work = work_of(run, known, text_bytes_per_token)
    open_stages = {state.instance.stage for state in known.values() if state.state is not State.CURRENT}
    unknown = [
        stage
        for stage in STAGES_WITH_A_RATE
        if stage in open_stages and work.tokens(stage).value != 0 and stated_or_measured(stage, work, stated) is None
    ]
    probes = _probes_for(unknown, run)
    if not probes:
        event("calibrated", "calibrate: every rate is known, stated or measured; nothing was probed")
        return None
    if work.vocab_size is None:
        raise InputError(
            "nothing can be probed: the vocabulary is not known",
            where=f"corpus.tokenizer: {run.corpus.tokenizer}",
            fix="name a tokenizer that is here, or make the corpus first",
        )
    device = resolve_device(run.device)
    found, failed = _probe_all(probes, _probe(run, known, int(work.vocab_size), device, budget_s), run)
    kind, made = machine_kind(device), datetime.now(UTC).isoformat(timespec="seconds")
    where = f"on {kind}, {made.partition('T')[0]}"
    calibration = Calibration(
        device=kind,
        made=made,
        # the kind of device that was found, where the run file says `auto`
        resolved=redacted_values(run.model_dump(mode="json")) | {"device": device.partition(":")[0]},
        tokens_per_s={stage: probed_figure(stage, work, found, failed, where) for stage in unknown},
    )
    write_atomically(Path(run.out) / CALIBRATION_NAME, calibration.model_dump_json(indent=2) + "\n")
    return calibration


def _probe_all(probes: list[str], whole: Probe, run: RunFile) -> tuple[dict[str, Rate], dict[str, str]]:
    """Return the rates by name, and why a probe failed by the probe's name; they share the budget of `whole`."""
    found: dict[str, Rate] = {}
    failed: dict[str, str] = {}
    # a teacher or student has two rates: training and forward pass
    budget_s = whole.budget_s / sum(1 if name == "cache" else 2 for name in probes)
    devices = devices_from(whole.device, max(1, run.cache.num_devices if "cache" in probes else 1))
    Path(run.out).mkdir(parents=True, exist_ok=True)
    with leases(devices, f"calibration of run {run.name}", True, cpu_group()):
        for name in probes:
            event("probing", f"calibrate: probes the {'cache stage' if name == 'cache' else name} on {whole.device}")
            # the probe writes to the disk that the run will write its shards to
            with tempfile.TemporaryDirectory(prefix="calibration-", dir=run.out) as scratch:
                try:
                    probe = replace(whole, scratch=Path(scratch), budget_s=budget_s)
                    found |= _in_own_process(_PROBES[name], probe)
                except (CapgapError, MemoryError, torch.OutOfMemoryError, BrokenProcessPool) as error:
                    failed[name] = "its process was killed" if isinstance(error, BrokenProcessPool) else str(error)
                    event("not_probed", f"calibrate: the {name} could not be probed: {failed[name]}")
    return found, failed


def _probes_for(unknown: list[str], run: RunFile) -> list[str]:
    """Return the names of the probes that find these stages' rates."""
    probes = ["cache"] if "cache" in unknown and run.cache.engine != "server" else []
    if "teacher" in unknown or ("eval" in unknown and run.measures_teacher):
        probes.append("teacher")
    if {"train", "eval"} & set(unknown):
        probes.append("student")
    return probes


def _probe(run: RunFile, known: dict[str, StageState], vocab_size: int, device: str, budget_s: float) -> Probe:
    made = finished("cache", run, known) or finished("corpus", run, known)
    return Probe(
        run=run.model_dump_json(),
        device=device,
        scratch=Path(run.out),
        vocab_size=vocab_size,
        seq_len=run.corpus.seq_len if made is None else next(iter(made.shard_sets.values())).seq_len,
        budget_s=budget_s,
        teacher=_made("teacher", run, known),
        cache=_made("cache", run, known),
    )


def _made(stage: ReusableStage, run: RunFile, known: dict[str, StageState]) -> str | None:
    """Return the folder or URL of the finished or reused stage; None where there is none."""
    if stage in run.reuse:
        return run.reuse[stage]
    return None if finished(stage, run, known) is None else str(known[stage].folder)


def _in_own_process(work: Callable[[Probe], dict[str, Rate]], probe: Probe) -> dict[str, Rate]:
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=die_with, initargs=(os.getpid(),)) as pool:
        return pool.submit(work, probe).result()


def probed_figure(stage: str, work: RunWork, found: dict[str, Rate], failed: dict[str, str], where: str) -> Figure:
    """Return the tokens/s of a stage from the probes' rates, on all its devices, or why there is none.

    Args:
        stage: The stage.
        work: What the run has to do.
        found: Rates by name.
        failed: Why a probe failed, by the probe's name.
        where: Device and date of the probes, in words.
    """
    if stage == "eval":
        return _eval_figure(work, found, failed, where)
    name = "student" if stage == "train" else stage
    rate = found.get(stage)
    if rate is None:
        why = failed.get(name, "the teacher is served elsewhere" if stage == "cache" else "it is not run")
        return Figure(value=None, source=f"could not be probed: {why}")
    source = f"probed: {rate.num_tokens:,} tokens in {rate.took_s:.2f} s {where}"
    # an engine is probed on all its devices, a training on one
    num_devices = 1 if stage == "cache" else work.num_devices(stage)
    if num_devices > 1:
        source += f", times {num_devices} devices"
    return Figure(value=rate.tokens_per_s * num_devices, source=source)


def _eval_figure(work: RunWork, found: dict[str, Rate], failed: dict[str, str], where: str) -> Figure:
    """Combine the models' forward rates: eval passes each held-out token through every model once."""
    num_students = len(work.run.seeds) * len(work.run.arms)
    num_teachers = work.num_models - num_students
    wanted = {"student": num_students} | ({"forward": num_teachers} if num_teachers else {})
    if any(name not in found for name in wanted):
        probes = ["student"] + (["teacher"] if num_teachers else [])
        why = "; ".join(failed[name] for name in probes if name in failed) or "the teacher is served elsewhere"
        return Figure(value=None, source=f"could not be probed: {why}")
    each_s = sum(number / found[name].tokens_per_s for name, number in wanted.items())
    return Figure(value=work.num_models / each_s, source=f"probed: forward passes alone, {where}")
