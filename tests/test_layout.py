"""Rules that hold over the whole repository. Each failure names the files at fault."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("schemas", "kernels", "pipeline", "jobs")
MAX_LINES = 400

# Layer: the layers above or beside it, which it must not import.
FORBIDDEN = {
    "schemas": {"kernels", "pipeline", "jobs"},
    "kernels": {"schemas", "pipeline", "jobs"},
    "pipeline": {"jobs"},
    "jobs": set(),
}

# Module: the folders that may import it. Whatever else reads a shard goes through the store.
STORE_ONLY = {
    "tarfile": ("pipeline/store",),
    "zstandard": ("pipeline/store",),
}

NOT_MIRRORED = {"faults", "e2e", "real", "assets"}  # tests of the whole, and what tests read


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def files(*suffixes: str, under: tuple[str, ...]) -> Iterator[Path]:
    for top in under:
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in suffixes and path.is_file():
                yield path


def python_files() -> list[Path]:
    return list(files(".py", under=(*LAYERS, "tests", "benchmarks")))


def module_name(path: Path) -> str:
    parts = ("capgap", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at the top or inside a function; `from a import b` gives a.b."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    return _imported(ast.parse(path.read_text()), package)


def _imported(tree: ast.AST, package: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                names.add(argument.value)
    return names


@pytest.mark.parametrize(
    "line, name",
    [
        ("import capgap.jobs.cli as c", "capgap.jobs.cli"),
        ("from capgap import jobs", "capgap.jobs"),
        ("def f():\n    from capgap.jobs.cli import main", "capgap.jobs.cli.main"),
        ("from ...jobs import cli", "capgap.jobs.cli"),
        ("import importlib\nimportlib.import_module('capgap.jobs')", "capgap.jobs"),
    ],
)
def test_every_way_of_importing_is_seen(line: str, name: str) -> None:
    assert name in _imported(ast.parse(line), "capgap.pipeline.store")


def test_the_packages_that_are_installed_are_the_folders() -> None:
    where = _pyproject()["tool"]["setuptools"]["packages"]["find"]["where"]
    found = [name for folder in where for name in find_packages(str(ROOT / folder))]
    folders = [module_name(init) for init in python_files() if init.name == "__init__.py" and _layer(init) in LAYERS]
    assert sorted(found) == sorted(["capgap", *folders])


def test_every_code_folder_is_a_package() -> None:
    folders = {path.parent for path in python_files() if _layer(path) in LAYERS}
    assert [relative(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_downwards(layer: str) -> None:
    wrong = [
        f"{relative(path)} imports {name}"
        for path in files(".py", under=(layer,))
        for name in sorted(imported(path))
        if name.startswith("capgap.") and name.split(".")[1] in FORBIDDEN[layer]
    ]
    assert wrong == []


@pytest.mark.parametrize("module", STORE_ONLY)
def test_shards_are_read_and_written_in_the_store_only(module: str) -> None:
    wrong = [
        relative(path)
        for path in files(".py", under=LAYERS)
        if module in {name.split(".")[0] for name in imported(path)}
        and not relative(path).startswith(tuple(f"{folder}/" for folder in STORE_ONLY[module]))
    ]
    assert wrong == []


def test_the_package_links_to_the_folders() -> None:
    links = {link.name: link.resolve() for link in (ROOT / "src" / "capgap").iterdir() if link.is_symlink()}
    assert links == {layer: ROOT / layer for layer in LAYERS}


def test_no_file_is_long() -> None:
    ours = files(".py", ".yaml", ".j2", ".md", under=(*LAYERS, "tests", "benchmarks", "docs", "docker"))
    counts = {relative(path): len(path.read_text().splitlines()) for path in ours}
    assert {name: count for name, count in counts.items() if count > MAX_LINES} == {}


def test_conftest_stands_in_tests_only() -> None:
    found = [relative(path) for path in python_files() if path.name == "conftest.py"]
    outside = [name for name in found if not name.startswith("tests/")]
    assert outside == []
    assert not (ROOT / "conftest.py").exists(), "pytest would put the root on sys.path"


def test_tests_mirror_the_code() -> None:
    folders = {path.parent.relative_to(ROOT / "tests") for path in files(".py", under=("tests",))} - {Path()}
    mirrored = [folder for folder in folders if folder.parts[0] not in NOT_MIRRORED]
    assert [f"tests/{folder.as_posix()}" for folder in sorted(mirrored) if not (ROOT / folder).is_dir()] == []


def test_every_dependency_says_who_needs_it() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    silent = [
        requirement
        for requirement in _requirements()
        if not any(re.search(rf'"{re.escape(requirement)}"[\],\s]*#\s*\w', line) for line in lines)
    ]
    assert silent == []


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "docker" / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    wrong = [
        f"{requirement}: pinned at {pins.get(requirement.name.lower())}"
        for requirement in map(Requirement, _requirements())
        if not requirement.specifier.contains(pins.get(requirement.name.lower(), "0"))
    ]
    assert wrong == []


def test_python_files_are_ascii() -> None:
    assert [relative(path) for path in python_files() if not path.read_bytes().isascii()] == []


def _layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def _pyproject() -> dict[str, dict]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _requirements() -> list[str]:
    project = _pyproject()["project"]
    return [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
