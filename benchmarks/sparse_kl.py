"""Time of the student's loss, forward and backward, over plain cross-entropy on full logits: ratios, interleaved.

python benchmarks/sparse_kl.py                     CPU shapes
python benchmarks/sparse_kl.py --device cuda       GPU shapes, bfloat16
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from machine import keep

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl

SHAPES = {
    "cpu": [(1024, 96, 4096, 20), (2048, 192, 4096, 20), (1024, 512, 32000, 20)],
    "cuda": [(8192, 2048, 32000, 50), (8192, 4096, 128256, 50), (8192, 2048, 151936, 64)],
}


def main() -> None:
    """Measure every shape, print a line each, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=9)
    flags = parser.parse_args()
    figures = [measure(*shape, flags.device, flags.repeats) for shape in SHAPES[flags.device]]
    path = keep("sparse-kl", flags.device, figures)
    print(f"kept in {path}")


def measure(num_rows: int, hidden: int, vocab: int, num_kept: int, device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of each way, and the ratio to plain cross-entropy."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden_NH = torch.randn(num_rows, hidden, device=device, generator=generator).to(dtype).requires_grad_()
    weight_VH = (torch.randn(vocab, hidden, device=device, generator=generator) / hidden**0.5).to(dtype)
    weight_VH.requires_grad_()
    labels_N = torch.randint(vocab, (num_rows,), device=device, generator=generator)
    ids_NK = torch.randint(vocab, (num_rows, num_kept), device=device, generator=generator)
    targets = SparseTargets(ids_NK, torch.full((num_rows, num_kept), 1 / num_kept, device=device))
    workspace_mb = 512 if device == "cuda" else 16

    def plain() -> torch.Tensor:
        return torch.nn.functional.cross_entropy((hidden_NH @ weight_VH.T).float(), labels_N)

    def fused(alpha: float) -> torch.Tensor:
        return linear_sparse_kl(
            hidden_NH, weight_VH, targets, labels_N, alpha=alpha, want_kl=alpha > 0, workspace_mb=workspace_mb
        ).loss

    def unfused() -> torch.Tensor:
        logprobs_NV = torch.log_softmax((hidden_NH @ weight_VH.T).float(), dim=-1)
        return -(logprobs_NV.gather(1, ids_NK) / num_kept).sum(dim=1).mean()

    ways = {
        "plain cross-entropy": plain,
        "fused cross-entropy": lambda: fused(0.0),
        "fused sparse KL": lambda: fused(1.0),
        "unfused sparse KL": unfused,
    }
    medians = _interleaved(ways, device, repeats)
    shape = f"N={num_rows} H={hidden} V={vocab} K={num_kept}"
    print(
        shape,
        *(f"{name} {ms:.1f} ms ({ms / medians['plain cross-entropy']:.2f}x)" for name, ms in medians.items()),
        sep="; ",
    )
    return {"num_rows": num_rows, "hidden": hidden, "vocab": vocab, "num_kept": num_kept} | {
        f"{name} ms": round(ms, 3) for name, ms in medians.items()
    }


def _interleaved(ways: dict[str, Callable[[], torch.Tensor]], device: str, repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            # the first round warms up
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
