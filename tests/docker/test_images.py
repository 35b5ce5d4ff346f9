"""The images, as far as they can be held to rules without an engine: files, pins, users, and the compose file."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from capgap.jobs.arguments import parse_run
from capgap.jobs.commands import run_parser
from capgap.pipeline.stages import declared

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
IMAGES = ["student", "teacher"]
# what a run with shards, a student and its evaluation has
ALWAYS = [stage.name for stage in declared() if stage.section not in ("rounds", "align", "tune", "benchmarks", "judge")]
TOOLS = Path(sys.executable).parent


def locked(image: str) -> dict[str, str]:
    """Version of every package that the image adds."""
    return dict(re.findall(r"^([\w.-]+)==(\S+) \\$", (DOCKER / f"requirements-{image}.txt").read_text(), re.MULTILINE))


def instructions(image: str) -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile with its arguments, continuation lines joined."""
    text = (DOCKER / f"{image}.Dockerfile").read_text()
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = text.replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


@pytest.mark.parametrize("image", IMAGES)
def test_every_file_of_the_lock_has_a_sha256_and_no_host_is_named(image: str) -> None:
    text = (DOCKER / f"requirements-{image}.txt").read_text()
    entries = [line for line in text.splitlines() if re.match(r"[\w.-]+==", line)]
    assert len(entries) == len(locked(image)) > 10
    for entry in re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry
    assert "://" not in text and "--index-url" not in text


@pytest.mark.parametrize("image", IMAGES)
def test_lock_and_base_hold_every_dependency_within_its_range(image: str, brought: Callable[[str], set[str]]) -> None:
    versions = {canonicalize_name(name): version for name, version in locked(image).items()}
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wrong = []
    for requirement in map(Requirement, needed):
        name = canonicalize_name(requirement.name)
        if name not in brought(image) and not requirement.specifier.contains(versions.get(name, "0")):
            wrong.append(f"{requirement}: {versions.get(name)}")
    assert wrong == [], "run docker/lock.sh"
    assert not versions.keys() & brought(image)


@pytest.mark.parametrize("image", IMAGES)
def test_the_lock_agrees_with_the_versions_that_were_tested_together(image: str) -> None:
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(line.split("==")[0]): line.split("==")[1]
        for line in lines
        if line and not line.startswith("#")
    }
    assert {n: v for n, v in locked(image).items() if pins.get(canonicalize_name(n), v) != v} == {}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_pinned_hash_locked_and_not_root(image: str) -> None:
    found = instructions(image)
    base = dict(found)["ARG"].split("=", 1)[1]
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", base), "a tag that names a version"
    assert dict(found)["FROM"] == "${" + dict(found)["ARG"].split("=")[0] + "}"
    installs = [arguments for name, arguments in found if name == "RUN" and "pip install" in arguments]
    assert len(installs) == 2
    assert "--require-hashes" in installs[0] and all("--no-deps" in install for install in installs)
    assert "--no-index" in installs[1] and "--no-build-isolation" in installs[1]
    users = [arguments for name, arguments in found if name == "USER"]
    assert users == ["10001"] and found[-1] == ("ENTRYPOINT", '["capgap"]')


@pytest.mark.parametrize("image", IMAGES)
def test_what_an_image_copies_exists_and_is_sent(image: str) -> None:
    sent = (DOCKER / f"{image}.Dockerfile.dockerignore").read_text().splitlines()
    for name, arguments in instructions(image):
        if name == "COPY":
            for source in arguments.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in sent, source


@pytest.mark.parametrize("image", IMAGES)
def test_hadolint_finds_nothing(image: str) -> None:
    if not (TOOLS / "hadolint").exists():
        pytest.skip("hadolint is not installed: make venv")
    done = subprocess.run(
        [TOOLS / "hadolint", DOCKER / f"{image}.Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return document


def test_the_compose_file_runs_each_stage_once_after_the_one_before_it() -> None:
    services = compose()["services"]
    assert list(services) == ALWAYS
    demo = str(ROOT / "jobs/runs/demo.yaml")
    for stage, service in services.items():
        words = service["command"]
        assert words[0] == "run" and words[-2:] == ["--only", stage]
        run, *_ = parse_run(run_parser(), [demo, *words[2:]])
        assert run.out == "/runs/out"
    for before, after in pairwise(ALWAYS):
        assert services[after]["depends_on"] == {before: {"condition": "service_completed_successfully"}}


def test_the_compose_file_has_the_teacher_s_stages_in_the_teacher_s_image_with_a_gpu_and_one_volume() -> None:
    services = compose()["services"]
    images = {stage: service["image"] for stage, service in services.items()}
    assert {stage for stage, image in images.items() if image == "capgap-teacher"} == {"corpus", "teacher", "cache"}
    for service in services.values():
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        assert any(volume.endswith(":/runs") for volume in service["volumes"])


def test_docker_compose_understands_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("needs Docker Compose")
    done = subprocess.run(
        [docker, "compose", "-f", DOCKER / "compose.yaml", "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
