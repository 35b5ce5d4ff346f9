"""What would let data become code is nowhere in what is shipped."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("schemas", "kernels", "pipeline", "jobs")

# Unpickling runs whatever the bytes say.
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# What webdataset has that neither decodes nor opens: its decoders unpickle, and `pipe:` in an address starts a program.
HARMLESS = {"webdataset": {"FluidWrapper", "TarWriter", "split_by_node", "split_by_worker"}}
HARMLESS |= {"webdataset.utils": {"pytorch_worker_info"}}
# By the name a call ends in.
CALLS = {"system", "popen", "getoutput", "unsafe_load", "full_load", "extractall", "url_to_fs"}
BUILTINS = {"eval", "exec", "compile"}  # a model's `.eval()` and `torch.compile` are none of them
YAML_LOADERS = {"SafeLoader", "CSafeLoader"}


def faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            refused = {*MODULES, *HARMLESS}
            yield from (f"imports {alias.name}" for alias in node.names if alias.name.split(".")[0] in refused)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in MODULES:
            yield f"imports {node.module}"
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in HARMLESS:
            harmless = HARMLESS.get(node.module, set())
            yield from (f"imports {alias.name} of {node.module}" for alias in node.names if alias.name not in harmless)
        elif isinstance(node, ast.Call):
            yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    arguments = {keyword.arg: keyword.value for keyword in node.keywords}
    values = {key: value.value for key, value in arguments.items() if isinstance(value, ast.Constant)}
    last = name.rpartition(".")[2]
    if last in CALLS or name in BUILTINS:
        yield f"calls {name}"
    if (name == "torch.load" or last == "load_from_checkpoint") and values.get("weights_only") is not True:
        yield f"{name} without weights_only=True"
    if last == "fit" and "ckpt_path" in arguments and values.get("weights_only") is not True:
        yield f"{name} with a checkpoint and without weights_only=True"
    if values.get("allow_pickle") is True or values.get("shell") is True or values.get("trust_remote_code") is True:
        yield f"{name} with {', '.join(key for key, value in values.items() if value is True and key)}"
    if name in ("yaml.load", "yaml.parse", "yaml.load_all"):
        loader = ast.unparse(arguments.get("Loader", ast.Constant("none"))).rpartition(".")[2]
        if loader not in YAML_LOADERS:
            yield f"{name} with {loader}"
    if name in ("fsspec.open", "fsspec.open_files", "fsspec.get_mapper", "fsspec.core.open"):
        yield f"{name}, which follows chains of URLs"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import webdataset as wds",
        "from webdataset import WebDataset",
        "from webdataset.autodecode import Decoder",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "trainer.fit(m, ckpt_path='x')",
        "np.load('x', allow_pickle=True)",
        "yaml.load(x)",
        "yaml.load(x, Loader=yaml.Loader)",
        "yaml.unsafe_load(x)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "eval(x)",
        "tar.extractall(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "fsspec.open(x)",
    ],
)
def test_each_way_is_seen(line: str) -> None:
    assert list(faults(ast.parse(line)))


@pytest.mark.parametrize(
    "line", ["torch.load('x', weights_only=True)", "model.eval()", "re.compile(x)", "from webdataset import TarWriter"]
)
def test_what_is_harmless_is_left_alone(line: str) -> None:
    assert not list(faults(ast.parse(line)))


def test_nothing_that_is_shipped_lets_data_become_code() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {fault}"
        for top in SHIPPED
        for path in sorted((ROOT / top).rglob("*.py"))
        for fault in faults(ast.parse(path.read_text()))
    ]
    assert found == []
