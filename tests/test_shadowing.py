"""The folder `kernels` never hides a package of the same name, such as Hugging Face's, that is installed.

A stand-in package named `kernels` is put where an installed one would be found. The tests then start Python in the
repository's root, as users do, where our folder stands first on the path.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "kernels" / "__init__.py"
NAMES = ["CUDAProperties", "Device", "LayerRepository", "Mode", "kernelize", "use_kernel_forward_from_hub"]

# Whatever transformers takes from Hugging Face's package, and nothing of it does anything.
STAND_IN = """
class _AnyType(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls()

class Anything(metaclass=_AnyType):
    def __init__(self, *given, **named): pass
    def __call__(self, given=None, *others, **named): return given
    def __hash__(self): return 1
    def __eq__(self, other): return True
    def __or__(self, other): return self

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""
METADATA = "Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"

# Written at the process's end, with sys.path as the started program has it.
PROBE = """
import atexit, os

def report():
    import json, kernels, capgap.kernels
    with open(os.environ["PROBE_REPORT"], "w") as file:
        json.dump({"kernels": kernels.__file__, "capgap.kernels": capgap.kernels.__file__}, file)

if "PROBE_REPORT" in os.environ:
    atexit.register(report)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    folder = tmp_path / "installed"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text(STAND_IN)
    (folder / "kernels" / "layer.py").write_text("from kernels import Mode\n")
    (folder / "kernels-0.dist-info").mkdir()
    (folder / "kernels-0.dist-info" / "METADATA").write_text(METADATA.format(version="0"))
    (folder / "sitecustomize.py").write_text(PROBE)
    return folder


def start(command: list[str], path: Path | str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, started in the root, with a folder behind it on the path of packages."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment |= {"PYTHONPATH": f"{ROOT / 'src'}:{path}", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)


def printed(code: str, path: Path | str = "") -> str:
    done = start([sys.executable, "-c", code], path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def found_by(command: list[str], installed: Path, **variables: str) -> dict[str, Path]:
    """Where the started program finds the two packages."""
    report = installed / "report.json"
    done = start(command, installed, PROBE_REPORT=str(report), **variables)
    assert done.returncode == 0, done.stderr
    return {name: Path(file).resolve() for name, file in json.loads(report.read_text()).items()}


def test_our_folder_is_met_first_by_python_started_in_the_root(installed: Path) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('kernels').origin)"
    assert Path(printed(code, installed)) == OURS, "the hazard is gone, so the tests below prove nothing"


@pytest.mark.parametrize("command", ["-c ''", "script", "capgap --help", "PYTHONSAFEPATH"])
def test_the_installed_package_is_found(installed: Path, command: str) -> None:
    script = installed / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n")
    words = {
        "script": [sys.executable, str(script)],
        "capgap --help": [str(Path(sys.executable).parent / "capgap"), "--help"],
    }.get(command, [sys.executable, "-c", ""])
    variables = {"PYTHONSAFEPATH": "1"} if command == "PYTHONSAFEPATH" else {}
    found = found_by(words, installed, **variables)
    assert found == {"kernels": installed / "kernels" / "__init__.py", "capgap.kernels": OURS}


def test_its_modules_and_names_are_those_of_the_installed_package(installed: Path) -> None:
    code = f"from kernels import {', '.join(NAMES)}; import kernels.layer as l, kernels; "
    code += (
        "import importlib.util; print(l.__file__, l.Mode is kernels.Mode, importlib.util.find_spec('kernels').origin)"
    )
    layer, same, origin = printed(code, installed).split()
    assert (Path(layer), same) == (installed / "kernels" / "layer.py", "True")
    assert Path(origin) == installed / "kernels" / "__init__.py"


def test_without_an_installed_package_nothing_of_ours_goes_by_the_name() -> None:
    code = "import kernels; print([name for name in vars(kernels) if not name.startswith('_')], kernels.__path__)\n"
    code += "try: import kernels.sparse_kl\nexcept ModuleNotFoundError as error: print(error)\n"
    code += "try: from kernels import get_kernel\nexcept ImportError: print('no such name')"
    names, missing, last = printed(code).splitlines()
    assert (names, missing, last) == ("[] []", "No module named 'kernels.sparse_kl'", "no such name")


def test_two_checkouts_on_the_path_do_not_hand_over_to_each_other(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "other" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import kernels; print(kernels.__file__)"
    assert Path(printed(code, tmp_path / "other")) == OURS
    found = Path(printed(code, f"{tmp_path / 'other'}:{installed}"))
    assert found == installed / "kernels" / "__init__.py"


def test_an_installed_package_that_does_not_import_says_so_itself(installed: Path) -> None:
    (installed / "kernels" / "__init__.py").write_text("raise ImportError('no wheel for this machine')")
    code = "try: import kernels\nexcept ImportError as error: print(error)"
    assert printed(code, installed) == "no wheel for this machine"


ASKED = """
from transformers.utils import import_utils
from transformers import LlamaConfig, LlamaForCausalLM
LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                             num_attention_heads=1))
import kernels
print(import_utils.is_kernels_available(), kernels.__file__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_installed", [False, True])
def test_transformers_makes_a_model_in_the_root(installed: Path, is_installed: bool) -> None:
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    metadata = installed / "kernels-0.dist-info" / "METADATA"
    metadata.write_text(METADATA.format(version=KERNELS_MIN_VERSION))
    available, file = printed(ASKED, installed if is_installed else "").splitlines()[-1].split()
    assert available == str(is_installed)
    assert Path(file) == (installed / "kernels" / "__init__.py" if is_installed else OURS)
