"""The folder `kernels` must never hide a package of the same name, such as Hugging Face's, that is installed.

A stand-in package named `kernels` is put where an installed one would be found. The tests then start Python from the
repository's root, as users do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "kernels" / "__init__.py"

# Written at the process's end, with sys.path as the started program has it.
PROBE = """
import atexit, os

def report():
    import json, kernels, capgap.kernels
    with open(os.environ["PROBE_REPORT"], "w") as file:
        json.dump({"kernels": kernels.__file__, "capgap.kernels": capgap.kernels.__file__}, file)

atexit.register(report)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    folder = tmp_path / "installed"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("")
    (folder / "sitecustomize.py").write_text(PROBE)
    return folder


def found_by(command: list[str], installed: Path, safe_path: bool = False) -> dict[str, Path]:
    """Where the started program finds the two packages."""
    report = installed / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment |= {"PYTHONPATH": str(installed), "PROBE_REPORT": str(report)}
    if safe_path:
        environment["PYTHONSAFEPATH"] = "1"
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return {name: Path(file).resolve() for name, file in json.loads(report.read_text()).items()}


def test_python_started_in_the_root_is_shadowed_unless_told_otherwise(installed: Path) -> None:
    found = found_by([sys.executable, "-c", ""], installed)
    assert found["kernels"] == OURS, "the hazard is gone, so the tests below prove nothing"


@pytest.mark.parametrize("options, safe_path", [(["-P"], False), ([], True)], ids=["-P", "PYTHONSAFEPATH"])
def test_safe_path_finds_the_installed_package(installed: Path, options: list[str], safe_path: bool) -> None:
    found = found_by([sys.executable, *options, "-c", ""], installed, safe_path)
    assert found == {"kernels": installed / "kernels" / "__init__.py", "capgap.kernels": OURS}


def test_the_console_script_finds_the_installed_package(installed: Path) -> None:
    script = Path(sys.executable).parent / "capgap"
    found = found_by([str(script), "--help"], installed)
    assert found == {"kernels": installed / "kernels" / "__init__.py", "capgap.kernels": OURS}


def test_the_root_is_not_on_the_path_of_the_tests() -> None:
    on_path = {Path(entry or ".").resolve() for entry in sys.path}
    assert ROOT not in on_path, "set PYTHONSAFEPATH=1 before `python -m pytest`, as `make test` does"
