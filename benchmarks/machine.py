"""Describe the machine that a figure was measured on, and write figures to results/."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from capgap.pipeline.stage.device import cpu_name, multiplies

RESULTS = Path(__file__).parent / "results"


def machine(device: str) -> dict[str, Any]:
    """Return the device's name, the numbers of cores and threads, and the versions of the packages that matter."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name()
    return {
        "device": name,
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "liger-kernel": _version("liger-kernel"),
    }


def keep(name: str, device: str, figures: Any, folder: Path = RESULTS) -> Path:
    """Write the figures as JSON to a file whose name names the device, and return its path."""
    about = machine(device)
    path = folder / f"{name}-{slug_of(about['device'])}.json"
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": about, "figures": figures}, indent=1) + "\n")
    return path


def every_kept(name: str, folder: Path = RESULTS) -> Iterator[tuple[str, Any]]:
    """Yield the device and content of each file that `keep` has written under that name."""
    for path in sorted(folder.glob(f"{name}-*.json")):
        content = json.loads(path.read_text())
        # the pattern also finds files of longer names
        if path.stem == f"{name}-{slug_of(content['machine']['device'])}":
            yield content["machine"]["device"], content


def mixed_precision(device: str) -> str:
    """Return the precision of trainings: bfloat16 if the device multiplies in it, else the faster float32."""
    return "bf16-mixed" if multiplies(device, "bfloat16") else "32-true"


@contextmanager
def caught(what: str, failed: list[str]) -> Iterator[None]:
    """Catch any error of the block, print it and add it to `failed`, so that the rest is still measured."""
    try:
        yield
    except Exception as error:  # whatever a peer, a compiler or a device raises
        failed.append(f"{what}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        print(f"  FAILED {failed[-1]}", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def slug_of(device: str) -> str:
    """Return a device's name in the form that file names take."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
