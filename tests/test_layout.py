"""Rules that hold over the whole repository. Each failure names the files at fault."""

import ast
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
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

# Module: the folders and files that may import it. Whatever else reads a shard goes through the store.
STORE_ONLY = {
    "tarfile": ("pipeline/store",),
    "zstandard": ("pipeline/store",),
    "webdataset": ("pipeline/store", "pipeline/api.py"),
}

# Modules that still import one another in a circle; the list only shrinks.
KNOWN_CIRCLES: set[frozenset[str]] = set()

# Names that two public classes still share; the list only shrinks.
KNOWN_DOUBLES: set[str] = set()

# Rooms of pipeline/, lowest first: a room imports those before it. The stages' own folders share one floor.
STAGES = (
    "corpus",
    "teacher",
    "generate",
    "cache",
    "align",
    "student",
    "train",
    "tune",
    "eval",
    "benchmark",
    "answers",
    "judge",
    "verify",
    "fidelity",
    "interchange",
)
FLOORS = (("store",), ("stage",), ("models",), STAGES, ("workflow",), ("pages",), ("plan",), ("report",), ("law",))

# Imports that still go upwards, as "file imports room". Each is to be mended; none may be added.
UPWARD: frozenset[str] = frozenset()

NOT_MIRRORED = {"faults", "e2e", "real", "assets", "tiny", "stand_ins"}  # tests of the whole, and what tests read


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


def test_no_modules_import_one_another_in_a_circle() -> None:
    paths = {module_name(path): path for path in files(".py", under=LAYERS)}
    edges = {name: _modules(imported(path), paths) - {name} for name, path in paths.items()}
    assert _circles(edges) == KNOWN_CIRCLES


def test_a_circle_is_seen_also_through_other_modules() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert _circles(edges) == {frozenset("abc")}


def test_rooms_of_pipeline_import_downwards() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    upward = {
        f"{relative(path)} imports {above}"
        for path in files(".py", under=("pipeline",))
        if (room := _room(module_name(path))) in floor
        for above in {_room(name) for name in imported(path)} & floor.keys()
        # between rooms of one floor only the stages' folders may import one another
        if floor[above] > floor[room] or (floor[above] == floor[room] and above != room and room not in STAGES)
    }
    assert upward - UPWARD == set(), "a room imports one above it"
    assert UPWARD - upward == set(), "these are mended: take them off the list"


def test_every_room_of_pipeline_has_a_floor() -> None:
    rooms = {path.parent.name for path in files(".py", under=("pipeline",)) if path.parent.parent == ROOT / "pipeline"}
    assert rooms == {room for floor in FLOORS for room in floor}


def _room(module: str) -> str:
    """The folder of pipeline/ that a module lies in; empty for any other."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["capgap", "pipeline"] and len(parts) > 2 else ""


@pytest.mark.parametrize("module", STORE_ONLY)
def test_shards_are_read_and_written_in_the_store_only(module: str) -> None:
    wrong = [
        relative(path)
        for path in files(".py", under=LAYERS)
        if module in {name.split(".")[0] for name in imported(path)}
        and not any(path.is_relative_to(ROOT / where) for where in STORE_ONLY[module])
    ]
    assert wrong == []


def test_the_package_links_to_the_folders() -> None:
    links = {link.name: link.resolve() for link in (ROOT / "src" / "capgap").iterdir() if link.is_symlink()}
    assert links == {layer: ROOT / layer for layer in LAYERS}


def test_no_two_public_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in files(".py", under=LAYERS):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(relative(path))
    doubled = {name: found for name, found in places.items() if len(found) > 1}
    assert {name: found for name, found in doubled.items() if name not in KNOWN_DOUBLES} == {}
    assert KNOWN_DOUBLES - doubled.keys() == set(), "these are mended: take them from the list"


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


def _modules(names: set[str], known: Collection[str]) -> set[str]:
    """The modules that imported names belong to; of `a.b.c` the longest part that is one."""
    parts = (name.split(".") for name in names)
    prefixes = ([".".join(part[:length]) for length in range(len(part), 0, -1)] for part in parts)
    return {next((prefix for prefix in found if prefix in known), "") for found in prefixes} - {""}


def _circles(edges: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """Sets of modules each of which reaches every other one."""
    reached = {name: _reached(name, edges) for name in edges}
    circles = ({other for other in reached[name] if name in reached[other]} for name in edges)
    return {frozenset(circle) for circle in circles if circle}


def _reached(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        further = edges[waiting.pop()] - found
        found |= further
        waiting += further
    return found


def _layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def _pyproject() -> dict[str, dict]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _requirements() -> list[str]:
    project = _pyproject()["project"]
    return [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
