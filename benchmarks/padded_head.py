"""What a row of a padded head costs in the capture, compared with a row of a head without padding.

python benchmarks/padded_head.py

The CPU time of `record_rows`, the part of the capture that sees the logits, is measured on one thread, for shapes of
real heads with and without padding. All shapes take turns. Figures are medians of microseconds per row, and the median
ratio of a turn's two figures.

Legend: N rows, V columns of the head.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import torch
from machine import keep

from capgap.pipeline.cache.scoring import Recording, record_rows

HEADS = {"Qwen3": (151_936, 151_669), "Gemma 3": (262_208, 262_144), "Phi-3": (32_064, 32_011)}
"""Number of columns of each model's head, and how many of them are real ids."""

RECORDINGS = {"sampled 50": (50, 0), "topk 64": (0, 64), "both": (50, 64)}


def us_a_row(num_columns: int, vocab_size: int, samples_and_top: tuple[int, int], num_rows: int) -> float:
    """Return the CPU microseconds per row of one chunk, whose last row is the last of a request."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(num_rows, num_columns, generator=generator) * 3
    labels_N = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    offsets_N = torch.rand(num_rows, generator=generator) if samples_and_top[0] else None
    recording = Recording(*samples_and_top, 1.0, 0, vocab_size, num_rows)
    since = time.process_time()
    record_rows(recording, logits_NV, labels_N, offsets_N, torch.tensor([num_rows - 1]))
    return (time.process_time() - since) / num_rows * 1e6


def main() -> None:
    """Measure, print a table, and write the figures to results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-rows", type=int, default=64, help="rows of a chunk")
    parser.add_argument("--repeats", type=int, default=15, help="number of turns, after one that does not count")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    taken_us: dict[tuple[str, str, bool], list[float]] = defaultdict(list)
    for repeat in range(flags.repeats + 1):
        for head, (num_columns, vocab_size) in HEADS.items():
            for name, kept in RECORDINGS.items():
                for is_padded in (False, True):
                    us = us_a_row(num_columns, vocab_size if is_padded else num_columns, kept, flags.num_rows)
                    if repeat:
                        taken_us[head, name, is_padded].append(us)
    rows = []
    for head, (num_columns, vocab_size) in HEADS.items():
        for name in RECORDINGS:
            whole, padded = taken_us[head, name, False], taken_us[head, name, True]
            ratio = statistics.median(p / w for p, w in zip(padded, whole, strict=True))
            row = {"head": head, "num_columns": num_columns, "vocab_size": vocab_size, "recording": name}
            row |= {"whole_us": round(statistics.median(whole), 1), "padded_us": round(statistics.median(padded), 1)}
            rows.append(row | {"ratio": round(ratio, 3)})
            print(f"{head:8} {name:10} whole {row['whole_us']:7} us, padded {row['padded_us']:7} us, ratio {ratio:.3f}")
    print(f"kept in {keep('padded-head', 'cpu', {'num_rows': flags.num_rows, 'rows': rows})}", file=sys.stderr)


if __name__ == "__main__":
    main()
