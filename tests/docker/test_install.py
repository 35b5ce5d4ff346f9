"""The student image's install steps in a clean virtual environment, word for word but for two paths.

What the base image would bring, torch and what it needs, is lent by the environment of the tests, at the end of the
path: what the steps installed comes first.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "schemas", "kernels", "pipeline", "jobs")
UNREACHABLE = ("Temporary failure in name resolution", "Connection", "(from versions: none)", "Network is unreachable")


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="capgap-image-") as folder:
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
        work = Path(folder, "src")
        for name in FOLDERS:
            shutil.copytree(ROOT / name, work / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, work)
        shutil.copy(ROOT / "docker" / "requirements-student.txt", work / "requirements.txt")
        yield Path(folder)


def _lend(names: set[str], folder: Path) -> None:
    """Link the packages of those names, as this environment has them, into a folder."""
    folder.mkdir()
    for name in names:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue  # of CUDA, which torch for a CPU does not need
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            (folder / top).symlink_to(str(package.locate_file(top)))


def _steps() -> list[str]:
    text = (ROOT / "docker" / "student.Dockerfile").read_text().replace("\\\n", " ")
    return [step for step in re.findall(r"^RUN (.*)$", text, re.MULTILINE) if "pip install" in step]


@pytest.mark.slow
def test_the_install_steps_of_the_student_image_leave_a_capgap_that_runs(
    image: Path, brought: Callable[[str], set[str]]
) -> None:
    python = image / "venv" / "bin" / "python3"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    lent = image / "lent"
    _lend(brought("student"), lent)
    (site / "base-image.pth").write_text(f"{lent}\n")
    env = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)
    for step in _steps():
        command = step.replace("/tmp/", f"{image}/").replace("/src/", f"{image}/src/")
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=image / "src",
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode and any(words in done.stdout + done.stderr for words in UNREACHABLE):
            pytest.skip(f"packages cannot be downloaded here: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    shown = subprocess.run(
        [python.with_name("capgap"), "--version"], env=env, capture_output=True, text=True, check=False
    )
    assert shown.stdout.startswith("capgap ")
    demo = ROOT / "jobs" / "runs" / "demo.yaml"
    status = subprocess.run(
        [python.with_name("capgap"), "status", demo, "--out", image / "runs"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert status.returncode == 0 and "never made" in status.stdout, status.stderr
    where = "import capgap.jobs, lightning, sys; print(capgap.jobs.__file__, lightning.__file__)"
    for path in subprocess.check_output([python, "-c", where], env=env, text=True).split():
        assert path.startswith(str(image)), "installed by the steps, not lent"
