"""Runs several writers at once, on this machine or a cluster; each is a Ray actor with devices of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from capgap.pipeline.cache.vllm_start import leave_cores_unbound
from capgap.pipeline.generate.unit import TextJob, TextMaker
from capgap.pipeline.generate.unit_record import TextRecord
from capgap.pipeline.stage.context import StageContext
from capgap.pipeline.stage.device import devices_from
from capgap.pipeline.stage.fleet import CountedReplica, Fleet, require_seen
from capgap.pipeline.stage.lease import LeaseRequest
from capgap.pipeline.stage.ray_cluster import ray_cluster

_SETTING = "rounds.replicas"


def make_by_replicas(job: TextJob, units: Sequence[int], context: StageContext) -> Iterator[TextRecord]:
    """Make the given units, and yield the record of each as soon as it is finished.

    Raises:
        MachineError: Ray is not installed, there are too few devices, or replicas keep dying.
        CapgapError, OSError: a unit cannot be made, for the reasons that `TextMaker.make` names.
    """
    num_replicas = min(job.settings.replicas, len(units))
    num_gpus = 0 if job.device == "cpu" else job.num_devices
    claim = LeaseRequest(context.holder, context.wait, context.group)
    with ray_cluster(num_replicas, num_gpus, _SETTING) as cluster:
        arguments = (cluster.ray.put(_portable(job)), claim)
        fleet = Fleet(cluster, WritingReplica, arguments, num_replicas, 1, _SETTING, "unit")
        for _, record in fleet.make(list(units)):
            yield record


class WritingReplica(CountedReplica):
    """A Ray actor that runs one writer in its own process.

    Args:
        job: the text that is written.
        claim: how the actor asks for the lease on its devices.
    """

    def __init__(self, job: TextJob, claim: LeaseRequest) -> None:
        leave_cores_unbound()
        self._job, self._claim, self._held, self._maker = job, claim, ExitStack(), TextMaker(job)

    def start(self) -> None:
        """Take the lease on the replica's own devices and start the writer there.

        Raises:
            InputError: this machine does not see the folder of the text.
            CapgapError: the lease cannot be taken, or the engine cannot be started.
        """
        job = self._job
        require_seen(job.work, job.folder, "text")
        self._held.enter_context(self._claim.leases(devices_from(job.device, job.num_devices)))
        self._maker.start()

    def make(self, unit: int) -> TextRecord:
        """Make a unit unless it is whole, and return its record; errors are those of `TextMaker.make`."""
        found = self._job.record(unit) if self._maker.require_whole(unit) else None
        return found or self._maker.make(unit)


def _portable(job: TextJob) -> TextJob:
    """Return the same job with absolute paths, because a replica runs in another working folder."""
    writer = Path(job.writer)
    return dataclasses.replace(
        job,
        folder=job.folder.resolve(),
        work=job.work.resolve(),
        writer=str(writer.resolve()) if writer.is_dir() else job.writer,
    )
