"""Texts of `nvidia-smi -L` as drivers print them: whole GPUs, MIG slices, and the slices' names before driver 470."""

from __future__ import annotations

import pytest

from capgap.pipeline.stage.gpus import Gpu, order_is_known, parse_listing, visible

WHOLE = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-950792bf-a01c-3f1a-e122-3473e67f54b2)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-95be04d1-8a2f-1f11-bd55-0c18a38a4b4e)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-2927d07e-3fe9-7904-9e08-b08b82d9a37d)
"""
H0, H1, H2 = (line.split("UUID: ")[1].rstrip(")") for line in WHOLE.splitlines())

CUT = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-9c73eb7b-8d6d-6c0e-dc13-97873e2ede40)
  MIG 1g.10gb     Device  0: (UUID: MIG-a686709d-6dc2-542a-8851-0d2508448c10)
  MIG 1c.3g.40gb  Device  1: (UUID: MIG-53864714-0a66-5df2-9007-9268e30d9a72)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-c92e2d5d-4a69-f1cd-4df0-305f8606705a)
"""
A0, A1 = "GPU-9c73eb7b-8d6d-6c0e-dc13-97873e2ede40", "GPU-c92e2d5d-4a69-f1cd-4df0-305f8606705a"
S0, S1 = "MIG-a686709d-6dc2-542a-8851-0d2508448c10", "MIG-53864714-0a66-5df2-9007-9268e30d9a72"

OLD = """\
GPU 0: A100-SXM4-40GB (UUID: GPU-b8ea3855-276c-c9cb-b366-c6fa655957c5)
  MIG 3g.20gb Device 0: (UUID: MIG-GPU-b8ea3855-276c-c9cb-b366-c6fa655957c5/1/0)
  MIG 3g.20gb Device 1: (UUID: MIG-GPU-b8ea3855-276c-c9cb-b366-c6fa655957c5/2/0)
"""
OLD_1 = "MIG-GPU-b8ea3855-276c-c9cb-b366-c6fa655957c5/2/0"


def test_every_gpu_is_listed_with_its_slices() -> None:
    assert parse_listing(WHOLE)[1] == Gpu(1, "NVIDIA H100 80GB HBM3", H1)
    assert [gpu.uuid for gpu in parse_listing(WHOLE)] == [H0, H1, H2]
    cut = parse_listing(CUT)
    assert [(gpu.uuid, gpu.slices) for gpu in cut] == [(A0, (S0, S1)), (A1, ())]
    assert parse_listing(OLD)[0].slices[1] == OLD_1


def test_what_is_no_gpu_is_none() -> None:
    assert parse_listing("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n") == []
    assert parse_listing("") == []
    torn = "GPU 0: NVIDIA A100 (UUID: GPU-b8ea3855-276c-c9cb-b366-c6fa655957c5)\n  Unable to determine MIG devices\n"
    assert [gpu.slices for gpu in parse_listing(torn)] == [()]


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        (None, [H0, H1, H2]),
        ("0", [H0]),
        ("2,0", [H2, H0]),
        (" 1 , 2", [H1, H2]),
        (H1, [H1]),
        (f"{H2},{H0}", [H2, H0]),
        ("GPU-29", [H2]),
        ("gpu-2927D07E", [H2]),
        ("GPU-95", []),  # fits two
        ("GPU-9507,GPU-95b", [H0, H1]),
        ("0,GPU-29", [H0, H2]),
        ("0,7,1", [H0]),  # what follows a number that fits nothing is not seen
        ("-1", []),
        ("1,-1,0", [H1]),
        ("", []),
        ("NoDevFiles", []),
        ("1,1", []),
        (f"1,{H1}", []),
    ],
)
def test_whole_gpus_are_seen_as_cuda_shows_them(setting: str | None, seen: list[str]) -> None:
    assert visible(parse_listing(WHOLE), setting) == seen


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        (None, [S0]),  # one slice alone, and no whole GPU beside it
        ("0", [S0]),
        ("1", [A1]),
        (S1, [S1]),
        (f"{S1},{S0}", [S1]),
        ("MIG-5386", [S1]),
        (A0, [S0]),
        (A1, [A1]),
        ("MIG-0000", []),
    ],
)
def test_of_slices_one_alone_is_seen(setting: str | None, seen: list[str]) -> None:
    assert visible(parse_listing(CUT), setting) == seen


def test_slices_of_old_drivers_are_named_by_gpu_and_numbers() -> None:
    assert visible(parse_listing(OLD), OLD_1) == [OLD_1]


def test_numbers_are_the_driver_s_only_where_all_gpus_are_alike_or_cuda_is_told_to_take_its_order() -> None:
    alike, mixed = parse_listing(WHOLE), parse_listing(WHOLE + CUT.splitlines()[3])
    assert order_is_known(alike, "1", None)
    assert not order_is_known(mixed, "1", None) and not order_is_known(mixed, None, "FASTEST_FIRST")
    assert order_is_known(mixed, "1", "PCI_BUS_ID") and order_is_known(mixed, H2, None)
