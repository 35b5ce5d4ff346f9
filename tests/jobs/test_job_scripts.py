"""The scripts for clusters are ones that their shells and capgap understand."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser as torchrun_parser

from capgap.jobs.arguments import parse_run
from capgap.jobs.commands import stage_parser
from capgap.pipeline.stage.context import Slice

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / "jobs/slurm/cache.sbatch", ROOT / "jobs/ray/cache.sh", ROOT / "jobs/slurm/train.sbatch"]
SCRIPTS += [ROOT / "jobs/slurm/corpus.sbatch", ROOT / "jobs/ray/corpus.sh"]
DEMO = str(ROOT / "jobs" / "runs" / "demo.yaml")


def _command(text: str, names: dict[str, str]) -> list[str]:
    """The words of the script's one capgap command, with the shell's names replaced by what they stand for."""
    (line,) = re.findall(r"^(?:srun |exec )?(capgap .*)$", text, re.MULTILINE)
    for name, value in names.items():
        line = re.sub(rf"\$\{{?{name}\}}?", value, line)
    assert "$" not in line
    return shlex.split(line)


def _parsed(words: list[str], stage: str = "cache") -> tuple:
    assert words[:2] == ["capgap", stage]
    return parse_run(stage_parser(stage), words[2:])


def test_the_corpus_is_made_by_slices_and_by_workers_of_a_cluster() -> None:
    names = {"run": DEMO, "workers": "64"}
    assert _parsed(_command(SCRIPTS[3].read_text(), names), "corpus")[1]["slice"] == "any"
    assert _parsed(_command(SCRIPTS[4].read_text(), names), "corpus")[0].corpus.workers == 64


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound_and_says_how_it_is_called(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    without_arguments = subprocess.run(["bash", path], capture_output=True, text=True, check=False)
    assert without_arguments.returncode != 0 and "usage: " in without_arguments.stderr


def test_the_tasks_of_the_array_are_all_slices() -> None:
    text = SCRIPTS[0].read_text()
    first, last = map(int, re.search(r"^#SBATCH --array=(\d+)-(\d+)$", text, re.MULTILINE).groups())
    tasks = range(first, last + 1)
    names = [{"run": DEMO, "SLURM_ARRAY_TASK_ID": str(i), "SLURM_ARRAY_TASK_COUNT": str(len(tasks))} for i in tasks]
    _require_all(_parsed(_command(text, name))[1]["slice"] for name in names)


def test_the_pods_of_the_job_are_all_slices() -> None:
    job = yaml.safe_load((ROOT / "jobs" / "k8s" / "cache.yaml").read_text())
    spec = job["spec"]
    assert (job["kind"], spec["completionMode"], spec["parallelism"]) == ("Job", "Indexed", spec["completions"])
    (text,) = spec["template"]["spec"]["containers"][0]["args"]
    commands = [
        _command(text.replace("/runs/run.yaml", DEMO), {"JOB_COMPLETION_INDEX": str(i)})
        for i in range(spec["completions"])
    ]
    _require_all(_parsed(words)[1]["slice"] for words in commands)


def _require_all(slices) -> None:
    parts = [Slice.parse(text) for text in slices]
    assert len(parts) > 1
    assert [sum(part.has(index) for part in parts) for index in range(50)] == [1] * 50


def test_the_ray_script_sets_the_replicas() -> None:
    run, *_ = _parsed(_command(SCRIPTS[1].read_text(), {"run": DEMO, "replicas": "16"}))
    assert run.cache.replicas == 16


def test_the_training_job_starts_a_rank_on_every_gpu_of_every_machine() -> None:
    """torchrun and capgap both know every flag."""
    text = SCRIPTS[2].read_text().replace("\\\n", " ")
    given = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert given["ntasks-per-node"] == "1", "one torchrun a machine"
    (line,) = re.findall(r"^srun torchrun (.*)$", text, re.MULTILINE)
    names = {"SLURM_JOB_NUM_NODES": given["nodes"], "SLURM_GPUS_ON_NODE": given["gpus-per-node"], "SLURM_JOB_ID": "7"}
    names |= {"first": "node-1", "run": DEMO}
    for name, value in names.items():
        line = line.replace(f"${name}", value)
    words = shlex.split(line.replace('"$@"', "--train.strategy fsdp2"))
    assert "$" not in line.replace('"$@"', "")
    arguments = torchrun_parser().parse_args(words)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.no_python) == ("2", "8", True)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("c10d", "node-1:29500")
    assert [arguments.training_script, arguments.training_script_args[0]] == ["capgap", "train"]
    run, *_ = parse_run(stage_parser("train"), arguments.training_script_args[1:])
    assert run.train.strategy == "fsdp2"
