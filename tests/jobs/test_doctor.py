"""What a machine has, and what that lets one do."""

from __future__ import annotations

import importlib.metadata
import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from capgap.jobs.cli import main
from capgap.jobs.doctor import EXTRAS, Machine, VisibleGpu, abilities, look_around, parse_gpus
from capgap.pipeline.store.extras import adding

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine() -> Machine:
    versions = {"capgap": "1", "Python": "3.11", "torch": "2.9", "transformers": "5", "lightning": "2", "triton": None}
    return Machine(versions | {"pyarrow": "20"}, None, (), False, 8, True, 10**10, 10**9, 10**11)


def possible(machine: Machine) -> dict[str, bool]:
    return {one.what: one.possible for one in abilities(machine)}


def test_every_extra_of_the_package_is_looked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"dev"}


def test_this_machine_is_described_and_the_command_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"torch           {importlib.metadata.version('torch')}" in said
    for words in ("Python ", "GPU ", "CPU ", "disk ", "train on the CPU: yes (", "score with transformers: yes"):
        assert f"\n{words}" in said
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_cpus"] >= 1 and found["free_disk_bytes"] > 0
    assert {one["what"] for one in found["abilities"]} == set(possible(look_around()))


def test_vllm_runs_where_it_was_built_for(machine: Machine) -> None:
    for_cpu = possible(replace(machine, vllm="0.32 for a CPU"))
    assert for_cpu["score with vLLM on the CPU"] and not for_cpu["score with vLLM on a GPU"]
    gpu = replace(machine, vllm="0.32 for GPUs", gpus=(VisibleGpu("H100", 80, 70),))
    assert not possible(gpu)["score with vLLM on a GPU"], "PyTorch does not see the GPU"
    seen = possible(replace(gpu, torch_sees_gpu=True))
    assert seen["score with vLLM on a GPU"] and not seen["score with vLLM on the CPU"] and seen["train on a GPU"]
    assert not possible(machine)["score with vLLM on the CPU"]


def test_what_is_lacking_says_how_to_get_it(machine: Machine) -> None:
    how = {one.what: one.how for one in abilities(machine)}
    assert f"not installed: {adding('teacher')}, or" in how["score with vLLM on the CPU"]
    hidden = replace(machine, gpus=(VisibleGpu("H100", 80, 70),))
    assert "install a build for CUDA" in {one.what: one.how for one in abilities(hidden)}["train on a GPU"]
    slow = {one.what: one for one in abilities(replace(machine, cpu_has_16_bits=False))}
    assert not slow["compute in bfloat16 on the CPU"].possible
    assert "float32 is many times as fast" in slow["compute in bfloat16 on the CPU"].how
    without = possible(replace(machine, versions=machine.versions | {"torch": None}))
    assert not without["train on the CPU"] and not without["score with transformers"]


def test_the_driver_s_table_is_read() -> None:
    text = "NVIDIA H100 80GB HBM3, 81559, 81008\nOdd, name, 10, 5\n[N/A], [N/A], [N/A]\n"
    first, second = parse_gpus(text)
    assert first == VisibleGpu("NVIDIA H100 80GB HBM3", 81559 << 20, 81008 << 20)
    assert second == VisibleGpu("Odd, name", 10 << 20, 5 << 20)
