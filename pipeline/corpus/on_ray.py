"""Makes the units of a corpus on the Ray cluster that RAY_ADDRESS names, in workers of one CPU each."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from capgap.pipeline.corpus.making import find_all_repeated
from capgap.pipeline.corpus.unit import CorpusJob, UnitMaker
from capgap.pipeline.stage.fleet import Fleet, require_seen
from capgap.pipeline.stage.ray_cluster import ray_cluster

_SETTING = "corpus.workers"


def make_on_ray(job: CorpusJob, num_workers: int, tick: Callable[[], None]) -> None:
    """Make the units that are not finished, and call `tick` after each.

    Raises:
        MachineError: Ray is not installed or not reached, has no free CPUs, or workers keep dying.
        CapgapError, OSError: a unit cannot be made, for the reasons that `UnitMaker.make` names.
    """
    if job.settings.dedup == "all":
        find_all_repeated(job)
    missing = [unit for unit in range(job.units.total) if unit not in job.units.made()]
    with ray_cluster(num_workers, 0, _SETTING) as cluster:
        # one CPU per worker, because a unit is made by one thread
        cluster = dataclasses.replace(cluster, num_cpus=1)
        fleet = Fleet(cluster, RayWorker, (cluster.ray.put(_portable(job)),), num_workers, 1, _SETTING, "unit")
        for _ in fleet.make(missing):
            tick()


class RayWorker:
    """A Ray actor that makes units in its own process."""

    def __init__(self, job: CorpusJob) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._job, self._maker = job, UnitMaker(job)

    def start(self) -> None:
        """Raise InputError if this machine does not see the folder of the corpus."""
        require_seen(self._job.work, self._job.folder, "corpus")

    def make(self, unit: int) -> None:
        """Make a unit unless it is finished; errors are those of `UnitMaker.make`."""
        if unit not in self._job.units.made():
            self._maker.make(unit, _nobody)


def _nobody(num_bytes: int, num_documents: int, num_tokens: int) -> None:
    pass


def _portable(job: CorpusJob) -> CorpusJob:
    """Return the same job with absolute paths, because a worker runs in another working folder."""
    files = tuple(
        file.model_copy(update={"path": str(file.place.resolve())}) if isinstance(file.place, Path) else file
        for file in job.listing.files
    )
    listing = job.listing.model_copy(update={"files": files})
    tokenizer = Path(job.tokenizer)
    return dataclasses.replace(
        job,
        listing=listing,
        folder=job.folder.resolve(),
        work=job.work.resolve(),
        texts=None if job.texts is None else job.texts.resolve(),
        tokenizer=str(tokenizer.resolve()) if tokenizer.is_dir() else job.tokenizer,
    )
