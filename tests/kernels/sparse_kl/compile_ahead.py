"""Compile the Triton kernel for GPUs that need not be here, and print what each program takes: a line of JSON each.

python compile_ahead.py [--all]
python compile_ahead.py --table    the README's table of registers and instructions

In a process of its own: whether kernels are compiled or interpreted is settled when Triton's modules are imported.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from capgap.kernels.sparse_kl.rows import RowSettings
from capgap.kernels.sparse_kl.triton_kernel import sparse_rows
from capgap.kernels.sparse_kl.triton_rows import specialise

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
NUM_COLUMNS = 128272  # a multiple of 16, as the buffer's is; the vocabulary is a number of the launch
TYPES = {
    "row_stride": "i32",
    "ids_ptr": "*i32",
    "p_ptr": "*fp32",
    "p_tail_ptr": "*fp32",
    "labels_ptr": "*i64",
    "ckl_ptr": "*fp32",
    "cce_ptr": "*fp32",
    "divergence_ptr": "*fp32",
    "ce_ptr": "*fp32",
    "vocab_size": "i32",
    "num_columns": "i32",
    "top_k": "i32",
}
SCALARS = ("inverse_temperature", "beta", "softcap")
Variant = tuple[int, str, str, float, float | None, bool, int, str]


def some() -> Iterator[Variant]:
    """Every architecture, divergence and temperature, in the two dtypes that are trained in."""
    settings = (ARCHITECTURES, ("bf16", "fp32"), ("forward_kl", "reverse_kl", "jsd"), (1.0, 2.0))
    yield from itertools.product(*settings, (None,), (True,), (64,), ("fp32",))
    yield from itertools.product(ARCHITECTURES, ("bf16", "fp32"), ("jsd",), (2.0,), (30.0,), (True,), (128,), ("fp32",))
    yield 90, "bf16", "jsd", 2.0, 30.0, True, 64, "fp64"


def every() -> Iterator[Variant]:
    """Everything that a program is compiled for."""
    settings = (ARCHITECTURES, ("fp16", "bf16", "fp32"), ("forward_kl", "reverse_kl", "jsd"), (1.0, 2.0), (None, 30.0))
    yield from itertools.product(*settings, (True, False), (0, 1, 20, 128, 256), ("fp32",))


def compile_one(variant: Variant) -> dict[str, Any]:
    """Registers, bytes of spills and of shared memory; loads of 128 bits and float64 instructions among its PTX."""
    architecture, dtype, divergence, temperature, softcap, want_gradient, top_k, scalar = variant
    settings = RowSettings(NUM_COLUMNS - 1, temperature, divergence, 0.5, softcap)
    constants, options = specialise(settings, want_gradient, 4 if dtype == "fp32" else 2, NUM_COLUMNS, top_k)
    types = TYPES | {"logits_ptr": f"*{dtype}"} | dict.fromkeys(SCALARS, scalar) | dict.fromkeys(constants, "constexpr")
    names = sparse_rows.arg_names
    # what a launch finds out about its arguments: torch's memory is aligned, pitches are multiples of 16
    aligned = [name for name in names if types[name][0] == "*" or name in ("row_stride", "num_columns")]
    source = ASTSource(
        fn=sparse_rows,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    program = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack, local = _resources(program.asm["cubin"])
    instructions = [one / (constants["BLOCK_V"] / 32 / options["num_warps"]) for one in _loops(program.asm["cubin"])]
    ptx = program.asm["ptx"]
    return {
        "variant": variant,
        "registers": registers,
        "instructions": instructions,
        "spill_bytes": stack + local,
        "shared_bytes": program.metadata.shared,
        "num_wide_loads": len(re.findall(r"ld\.global\S*\.v4", ptx)),
        "num_wide_stores": len(re.findall(r"st\.global\S*\.v4", ptx)),
        "float64": re.findall(r"^\s*(?:@\S+\s+)?(\w\S*\.f64\S*)", ptx, re.MULTILINE),
    }


def _resources(cubin: bytes) -> tuple[int, int, int]:
    printed = _printed(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)
    assert found, printed
    return int(found[1]), int(found[2]), int(found[3])


def _loops(cubin: bytes) -> list[int]:
    """Instructions of each loop, in order: from the target of a jump back to the jump."""
    code = [
        (int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", _printed(cubin, "-sass"))
    ]
    jumps = [(at, re.search(r"\bBRA(?:\.\S+)? .*?0x([0-9a-f]+)", what)) for at, what in code]
    loops = sorted((int(found[1], 16), at) for at, found in jumps if found and int(found[1], 16) < at)
    return [sum(first <= at <= last and not what.startswith("NOP") for at, what in code) for first, last in loops]


def _printed(cubin: bytes, *flags: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([tool, *flags, file.name], capture_output=True, text=True, check=True).stdout


def tabled() -> Iterator[Variant]:
    """What the table is of: 64 kept ids, a gradient, every divergence."""
    settings = (("bf16", "fp32"), ("forward_kl", "reverse_kl", "jsd"), ((1.0, None), (2.0, None), (2.0, 30.0)))
    for architecture, (dtype, divergence, (temperature, softcap)) in itertools.product(
        ARCHITECTURES, itertools.product(*settings)
    ):
        yield architecture, dtype, divergence, temperature, softcap, True, 64, "fp32"


def table(programs: Iterable[dict[str, Any]]) -> str:
    """Registers of a thread, and instructions an element in the two passes over a row, least to most."""
    cells: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for program in programs:
        architecture, dtype, _, temperature, softcap, *_ = program["variant"]
        kind = "softcap, T = 2" if softcap else f"T = {temperature:g}"
        cells[f"{kind}, {'float32' if dtype == 'fp32' else '16 bits'}", architecture].append(program)
    names = dict.fromkeys(name for name, _ in cells)
    lines = ["| | " + " | ".join(f"`sm_{architecture}`" for architecture in ARCHITECTURES) + " |"]
    lines.append("|---" * (1 + len(ARCHITECTURES)) + "|")
    lines += [
        f"| {name} | " + " | ".join(_cell(cells[name, architecture]) for architecture in ARCHITECTURES) + " |"
        for name in names
    ]
    return "\n".join(lines)


def _cell(programs: list[dict[str, Any]]) -> str:
    registers = [program["registers"] for program in programs]
    spilled = sum(program["spill_bytes"] for program in programs)
    passes = [max(program["instructions"][number] for program in programs) for number in (0, 1)]
    between = f"{min(registers)}" if min(registers) == max(registers) else f"{min(registers)}-{max(registers)}"
    return f"{between}; {passes[0]:.1f} + {passes[1]:.1f}" + (f"; spills {spilled} bytes" if spilled else "")


def _compiled(chosen: Iterable[Variant]) -> Iterator[dict[str, Any]]:
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_one, chosen, chunksize=4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="everything that a program is compiled for: minutes")
    parser.add_argument("--table", action="store_true", help="registers and instructions, as a table")
    flags = parser.parse_args()
    if flags.table:
        print(table(_compiled(tabled())))
    else:
        for figures in _compiled(every() if flags.all else some()):
            print(json.dumps(figures), flush=True)
