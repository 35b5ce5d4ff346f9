"""Start the ranks of a training on this machine, under torch's own supervisor, and end with them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from capgap.pipeline.stage.command import handed_on
from capgap.pipeline.stage.context import Instance
from capgap.schemas.errors import MachineError
from capgap.schemas.run_file import RunFile

LOST = 75
"""Exit code of a rank that ended because another rank had ended; the command line uses it for nothing else."""

# exit code of a rank that was asked to end
_INTERRUPTED = 130

_MARK = "CAPGAP_LAUNCHED"


class RankFailedError(MachineError):
    """A process of a training failed. The error is not shown if that process has said why."""


def launch(run: RunFile, instance: Instance, num_ranks: int, *, remake: bool, wait: bool) -> None:
    """Run the instance's stage in `num_ranks` processes, and return when all have ended well.

    All processes are killed when one fails, and when this process dies.

    Raises:
        RankFailedError: A process failed.
        KeyboardInterrupt: This process was interrupted.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="capgap-ranks-") as scratch, _surroundings(num_ranks):
        resolved = Path(scratch) / "run.json"
        resolved.write_text(run.model_dump_json())
        # -P: with -m Python would look for packages in the user's working folder first, unlike the command `capgap`
        command = ["-P", "-m", "capgap.jobs.cli", instance.stage, "--config", str(resolved)]
        command += ["--instance", instance.name]
        command += ["--force"] if remake else []
        command += [] if wait else ["--no-wait"]
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            run_id=Path(scratch).name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
        )
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            raise _failed(instance, {rank: failure.exitcode for rank, failure in error.failures.items()}) from None
        except SignalException:
            raise KeyboardInterrupt from None


def is_launched() -> bool:
    """Return whether `launch` started this process, in which case the launching process reports its end."""
    return _MARK in os.environ


def _failed(instance: Instance, codes: dict[int, int]) -> RankFailedError:
    """Return the error of the rank that failed first; the others were asked to end, or have lost a rank."""
    rank, code = min(codes.items(), key=lambda item: (item[1] in (LOST, _INTERRUPTED, -signal.SIGTERM), item[1]))
    error = RankFailedError(
        f"{instance.name} failed",
        where=f"rank {rank}",
        found=f"killed by signal {-code}" if code < 0 else f"exit code {code}",
        fix="mend the cause and run the same command again",
    )
    if 0 < code < LOST:
        # the process has reported the cause itself
        error.already_said, error.exit_code = True, code
    return error


@contextmanager
def _surroundings(num_ranks: int) -> Iterator[None]:
    """Set the ranks' environment and silence the supervisor's log while they run; its messages do not suit users."""
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    given = {**handed_on(), "CAPGAP_DRIVER_PID": str(os.getpid()), _MARK: "1"}
    given |= {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
