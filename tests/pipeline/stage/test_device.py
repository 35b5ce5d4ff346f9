from __future__ import annotations

from pathlib import Path

import pytest

from capgap.pipeline.stage.device import (
    device_identity,
    devices_from,
    multiplies,
    resolve_device,
    warn_of_slow_products,
)
from capgap.schemas.errors import MachineError

# The driver's tool, by a script that prints what a machine with a cut GPU prints.
LISTING = """#!/bin/sh
[ "$1" = -L ] || exit 1
cat <<'END'
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-9c73eb7b-8d6d-6c0e-dc13-97873e2ede40)
  MIG 3g.40gb     Device  0: (UUID: MIG-a686709d-6dc2-542a-8851-0d2508448c10)
  MIG 3g.40gb     Device  1: (UUID: MIG-53864714-0a66-5df2-9007-9268e30d9a72)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-c92e2d5d-4a69-f1cd-4df0-305f8606705a)
END
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(LISTING)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_the_cpu_is_one_device() -> None:
    assert device_identity("cpu") == "cpu"
    assert devices_from("cpu", 4) == ["cpu"] and devices_from("cuda:0", 2) == ["cuda:0", "cuda:1"]
    assert resolve_device("cpu") == "cpu"


def test_two_slices_of_a_gpu_are_two_devices_and_another_gpu_is_a_third(machine: pytest.MonkeyPatch) -> None:
    names = set()
    for setting in ("MIG-a686709d-6dc2-542a-8851-0d2508448c10", "MIG-5386", "1"):
        machine.setenv("CUDA_VISIBLE_DEVICES", setting)
        names.add(device_identity("cuda:0"))
    assert names == {
        "mig-a686709d-6dc2-542a-8851-0d2508448c10",
        "mig-53864714-0a66-5df2-9007-9268e30d9a72",
        "gpu-c92e2d5d-4a69-f1cd-4df0-305f8606705a",
    }


def test_one_device_has_one_name_however_it_is_shown(machine: pytest.MonkeyPatch) -> None:
    names = set()
    for setting in ("1", "GPU-c92e", "GPU-C92E2D5D-4a69-f1cd-4df0-305f8606705a"):
        machine.setenv("CUDA_VISIBLE_DEVICES", setting)
        names.add(device_identity("cuda:0"))
    assert len(names) == 1


def test_more_devices_than_cuda_shows_are_refused_with_both_numbers(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(MachineError, match=r"CUDA_VISIBLE_DEVICES: 1: too few devices; found 1 .* expected at least 2"):
        device_identity("cuda:1")


@pytest.mark.usefixtures("without_16_bits")
def test_a_processor_without_such_products_is_slow_in_16_bits_alone() -> None:
    assert not multiplies("cpu", "bfloat16")
    assert not multiplies("cpu", "float16")
    assert multiplies("cpu", "float32")
    assert multiplies("cuda:0", "bfloat16")


@pytest.mark.usefixtures("without_16_bits")
def test_what_is_slow_in_16_bits_is_warned_of_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_slow_products("precision bf16-mixed", "cpu", "float32", "do nothing")
    assert not caplog.records
    warn_of_slow_products("precision bf16-mixed", "cpu", "bfloat16", "set precision to 32-true")
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "precision bf16-mixed works in bfloat16" in record.getMessage()
    assert "set precision to 32-true" in record.getMessage()
