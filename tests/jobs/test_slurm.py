"""The scripts for SLURM do on a cluster of one node what the commands in them do by hand.

The cluster is Debian's `slurm-wlm` with `munge`, started by root on the loopback; without them the tests are skipped.
Its node says that it has two GPUs, which nobody uses: the models are on the processor.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "jobs" / "slurm"
DAEMONS = ("munged", "slurmctld", "slurmd")
# what a job of the smallest size asks of a node, in place of what the scripts ask
SMALL = ("--mem=4G", "--cpus-per-task=1", "--time=60")
WITHIN_S = 1800

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={num_cpus} RealMemory=9000 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster that runs; commands find it through the environment."""
    missing = [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root, and Debian's slurm-wlm and munge: {', '.join(missing) or 'not root'}")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(2)
    conf = CONF.format(host=host, ports=ports, folder=folder, num_cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(conf)
    # two files that any machine has stand for the devices
    gpus = [f"NodeName={host} Name=gpu File={device}\n" for device in ("/dev/null", "/dev/zero")]
    (folder / "gres.conf").write_text("".join(gpus))
    with ExitStack() as stack, pytest.MonkeyPatch.context() as environment:
        environment.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        environment.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin")
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = [f"--socket={folder}/munge/socket", f"--key-file={key}", f"--log-file={folder}/munge/log"]
        munge += [f"--pid-file={folder}/munge/pid", f"--seed-file={folder}/munge/seed", "--force"]
        for daemon in (["munged", "--foreground", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
            process = subprocess.Popen(daemon, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        _wait_for_node(folder)
        yield


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_for_node(folder: Path) -> None:
    until = time.monotonic() + WITHIN_S
    while time.monotonic() < until:
        found = subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, check=False)
        if found.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = "\n".join(path.read_text()[-1500:] for path in folder.glob("slurm*.log"))
    raise AssertionError(f"the node did not come up: {found.stdout}{found.stderr}\n{logs}")


def submit(folder: Path, script: str, *arguments: str) -> None:
    """Submit a script of ours from a folder, and wait until all its tasks have ended well."""
    *flags, run = arguments
    done = subprocess.run(
        ["sbatch", "--wait", *SMALL, *flags, SLURM / script, run],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    logs = "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(folder.glob("capgap-*.log")))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{logs}"


def run_file(folder: Path) -> RunFile:
    """The smallest run, with one student and a teacher that transformers runs; written to `folder/run.yaml`."""
    given = yaml.safe_load((ROOT / "tests/assets/tiny.yaml").read_text())
    del given["arms"]["cross_entropy"], given["eval"]
    given["out"] = str(folder / "out")
    given["corpus"] |= {"unit_bytes": 1_000_000, "shard_sequences": 32}
    given["cache"] |= {"engine": "transformers", "max_tokens": 8000}
    given["teacher"]["training"]["max_tokens"] = 4000
    given["train"]["max_tokens"] = 4000
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(given))
    return RunFile.model_validate(given)


def made(run: RunFile, stage: str) -> Manifest:
    """The manifest of a finished stage."""
    found = read_manifest(Path(run.out) / stage)
    assert found is not None, f"{stage} is not finished"
    return found


def test_corpus_cache_and_train_run_as_jobs_and_make_what_the_commands_make(tmp_path: Path) -> None:
    jobs, by_hand = run_file(tmp_path / "jobs"), run_file(tmp_path / "by-hand")
    submit(tmp_path / "jobs", "corpus.sbatch", "--array=0-1", "run.yaml")
    assert made(jobs, "corpus").content == carry_out(by_hand, Instance("corpus")).content
    assert carry_out(jobs, Instance("teacher")).content == carry_out(by_hand, Instance("teacher")).content
    submit(tmp_path / "jobs", "cache.sbatch", "--array=0-1", "run.yaml")
    assert made(jobs, "cache").content == carry_out(by_hand, Instance("cache")).content
    carry_out(jobs, Instance("student", seed=0))
    submit(tmp_path / "jobs", "train.sbatch", "--nodes=1", "--gpus-per-node=2", "run.yaml")
    assert made(jobs, "train/distilled/seed-0").totals["num_steps"] > 0


def test_a_task_that_is_put_back_goes_on_where_it_was(tmp_path: Path) -> None:
    run, by_hand = run_file(tmp_path / "jobs"), run_file(tmp_path / "by-hand")
    command = ["sbatch", "--parsable", *SMALL, "--array=0-0", SLURM / "corpus.sbatch", "run.yaml"]
    job = subprocess.run(command, cwd=tmp_path / "jobs", capture_output=True, text=True, check=True).stdout.strip()
    units = tmp_path / "jobs" / "out" / "corpus" / "work" / "units"
    until = time.monotonic() + WITHIN_S
    while not list(units.glob("*.json")) and time.monotonic() < until:
        time.sleep(0.05)
    subprocess.run(["scontrol", "requeue", f"{job}_0"], check=True)
    # a job that was put back waits for two minutes, unless it is told not to
    while read_manifest(Path(run.out) / "corpus") is None and time.monotonic() < until:
        subprocess.run(["scontrol", "update", f"JobId={job}_0", "StartTime=now"], capture_output=True, check=False)
        time.sleep(1.0)
    assert made(run, "corpus").content == carry_out(by_hand, Instance("corpus")).content
