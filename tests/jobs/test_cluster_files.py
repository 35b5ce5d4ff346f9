"""The files for Kubernetes and SkyPilot say what capgap understands, and what their public schemas do."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from capgap.jobs.arguments import parse_run
from capgap.jobs.commands import run_parser, stage_parser
from capgap.pipeline.stage.context import Slice

ROOT = Path(__file__).parents[2]
K8S, SKY = ROOT / "jobs" / "k8s", ROOT / "jobs" / "sky"
DEMO = str(ROOT / "jobs" / "runs" / "demo.yaml")
SCRIPTS = sorted(
    [*ROOT.glob("jobs/*/*.sh"), *ROOT.glob("jobs/*/*.sbatch"), *ROOT.glob("docker/*.sh"), ROOT / ".ci/run"]
)

# SkyPilot is 98 packages, and Kubernetes' schemas are 100 MB: neither belongs into every environment.
KUBERNETES_VALIDATE, SKYPILOT = "kubernetes-validate==1.37.0", "skypilot==0.14.1"
UNREACHABLE = ("Temporary failure in name resolution", "Connection", "(from versions: none)", "Network is unreachable")


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


def command(text: str, names: dict[str, str]) -> list[str]:
    """The words of the one capgap command in a shell's text, with the shell's names replaced."""
    (line,) = re.findall(r"^(?:exec )?(capgap .*)$", text, re.MULTILINE)
    for name, value in names.items():
        line = re.sub(rf"\$\{{?{name}\b\}}?", value, line)
    assert "$" not in line
    return shlex.split(line.replace("/runs/run.yaml", DEMO))


def slices_of(text: str, index: str, others: dict[str, str], count: int) -> list[Slice]:
    found = []
    for number in range(count):
        words = command(text, {index: str(number), **others})
        assert words[:2] == ["capgap", "cache"]
        found.append(Slice.parse(parse_run(stage_parser("cache"), words[2:]).flags["slice"]))
    return found


def require_all(parts: list[Slice]) -> None:
    assert [sum(part.has(index) for part in parts) for index in range(50)] == [1] * 50


def require_from_student(text: str, names: dict[str, str]) -> None:
    words = command(text, names)
    assert words[:2] == ["capgap", "run"]
    assert parse_run(run_parser(), words[2:]).flags["from_stage"] == "student"


def test_the_job_set_caches_in_slices_and_trains_when_all_are_done() -> None:
    cache, train = load(K8S / "cache-then-train.yaml")["spec"]["replicatedJobs"]
    assert train["dependsOn"] == [{"name": cache["name"], "status": "Complete"}]
    spec = cache["template"]["spec"]
    assert (spec["completionMode"], spec["parallelism"]) == ("Indexed", spec["completions"])
    (args,) = spec["template"]["spec"]["containers"][0]["args"]
    require_all(slices_of(args, "JOB_COMPLETION_INDEX", {}, spec["completions"]))
    (container,) = train["template"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "capgap-student"
    require_from_student(container["args"][0], {})


def test_sky_caches_in_slices_on_spot_machines_and_trains_on_one() -> None:
    cache, train = load(SKY / "cache.yaml"), load(SKY / "train.yaml")
    assert cache["resources"]["use_spot"] is True and train["resources"]["use_spot"] is True
    names = {"SKYPILOT_NUM_NODES": str(cache["num_nodes"]), "RUN": cache["envs"]["RUN"]}
    require_all(slices_of(cache["run"], "SKYPILOT_NODE_RANK", names, cache["num_nodes"]))
    require_from_student(train["run"].replace('"$RUN"', train["envs"]["RUN"]), {})
    volume = load(SKY / "volume.yaml")
    assert {*cache["volumes"].values(), *train["volumes"].values()} == {volume["name"]}
    assert volume["config"]["access_mode"] == "ReadWriteMany"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_one_that_bash_and_shellcheck_understand(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed: make venv")
    done = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture(scope="module")
def validators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Python with the two packages that carry the schemas."""
    folder = tmp_path_factory.mktemp("validators")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", KUBERNETES_VALIDATE, SKYPILOT],
        capture_output=True,
        text=True,
        check=False,
    )
    if installed.returncode and any(words in installed.stderr for words in UNREACHABLE):
        pytest.skip(f"packages cannot be downloaded here: {installed.stderr.strip().splitlines()[-1]}")
    assert installed.returncode == 0, installed.stderr[-3000:]
    yield python


_KUBERNETES = """
import sys, yaml, kubernetes_validate
jobs = yaml.safe_load(sys.stdin)
for job in jobs:
    kubernetes_validate.validate(job, "1.33", strict=True)
print(len(jobs))
"""

_SKY = """
import sys, yaml
from sky.utils import common_utils, schemas
for path in sys.argv[1:]:
    schema = schemas.get_volume_schema() if path.endswith("volume.yaml") else schemas.get_task_schema()
    common_utils.validate_schema(yaml.safe_load(open(path)), schema, path + ": ")
    print(path)
"""


@pytest.mark.slow
def test_kubernetes_schemas_agree_strictly(validators: Path) -> None:
    job_set = load(K8S / "cache-then-train.yaml")
    # the set's own few fields are those of its custom resource; the jobs in it are Kubernetes'
    jobs = [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": part["name"]}, "spec": part["template"]["spec"]}
        for part in job_set["spec"]["replicatedJobs"]
    ]
    jobs.append(load(K8S / "cache.yaml"))
    done = _run(validators, _KUBERNETES, yaml.safe_dump(jobs))
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
    jobs[0]["spec"]["completion"] = 3
    assert _run(validators, _KUBERNETES, yaml.safe_dump(jobs)).returncode != 0, "a misspelt field is found"


@pytest.mark.slow
def test_skypilot_s_schemas_agree(validators: Path, tmp_path: Path) -> None:
    paths = sorted(map(str, SKY.glob("*.yaml")))
    done = _run(validators, _SKY, "", *paths)
    assert done.stdout.split() == paths, done.stderr
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((SKY / "cache.yaml").read_text().replace("num_nodes", "num_node"))
    assert _run(validators, _SKY, "", str(wrong)).returncode != 0, "a misspelt field is found"


def _run(python: Path, code: str, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-c", code, *arguments], input=text, capture_output=True, text=True, timeout=1800, check=False
    )
