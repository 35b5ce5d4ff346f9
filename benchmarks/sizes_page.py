"""Fill the tables of docs/sizes.md: the disk space of caches, and the memory and disk space of models.

python benchmarks/sizes_page.py

The bytes of a cache are those that `capgap plan` uses; the bytes of a parameter are those by which a training is
refused for lack of memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

from page_tables import Row, with_tables

from capgap.pipeline.plan.measured import cache_bytes_per_token
from capgap.pipeline.plan.sizes import checkpoint_bytes, num_checkpoints
from capgap.schemas.run_cache import CacheSettings
from capgap.schemas.run_optimization import OptimizationSettings

PAGE = Path(__file__).parents[1] / "docs" / "sizes.md"

STUDENTS = {"135M": 135e6, "0.5B": 0.5e9, "1B": 1e9, "3B": 3e9, "7B": 7e9}
TEACHERS = {"1B": 1e9, "3B": 3e9, "7B": 7e9, "13B": 13e9, "34B": 34e9, "70B": 70e9}
# weights, gradients and AdamW's two moments, each in the dtype of the weights: docs/student.md
_HELD = 4
_WEIGHT_BYTES = {"bf16-mixed": 4, "bf16-true": 2}
_RECORDINGS: dict[str, dict[str, str | int]] = {
    "`sampled`, 50 samples": {},
    "`topk`, 64, `small`": {"recording": "topk", "top_k": 64, "profile": "small"},
    "`topk`, 64, `compact`": {"recording": "topk", "top_k": 64, "profile": "compact"},
    "`topk`, 64, `near-lossless`": {"recording": "topk", "top_k": 64, "profile": "near-lossless"},
    "`topk`, 64, `lossless`": {"recording": "topk", "top_k": 64, "profile": "lossless"},
}


def main() -> None:
    """Write the page with its tables filled in."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    PAGE.write_text(filled(PAGE.read_text()))


def filled(page: str) -> str:
    """Return the page with its tables computed again."""
    tables = {"cache": _cache(), "student": _student(), "teacher": _teacher()}
    return with_tables(page, "sizes_page.py", tables)


def _cache() -> list[Row]:
    rows: list[Row] = [
        ("recording", "bytes a token, vocabulary 32,768", "119,713", "GB for 100M tokens", "1B", "10B"),
        ("---", *["---:"] * 5),
    ]
    for name, settings in _RECORDINGS.items():
        small, large = (
            cache_bytes_per_token(CacheSettings.model_validate(settings), size).value or 0 for size in (32768, 119713)
        )
        rows.append((name, f"{small:.0f}", f"{large:.0f}", *(f"{large * n:,.1f}" for n in (0.1, 1, 10))))
    return rows


def _student() -> list[Row]:
    rows: list[Row] = [
        (
            "student",
            "device GB, `32-true` or `bf16-mixed`",
            "the same on 8 devices, `fsdp2`",
            "device GB, `bf16-true`",
            "GB on disk, trained",
            "more while it trains",
        ),
        ("---", *["---:"] * 5),
    ]
    usual = OptimizationSettings()
    for name, size in STUDENTS.items():
        wide, narrow = (size * _HELD * each / 1e9 for each in _WEIGHT_BYTES.values())
        scratch = size * checkpoint_bytes(usual) * num_checkpoints(usual) / 1e9
        rows.append((name, *(f"{gb:,.1f}" for gb in (wide, wide / 8, narrow, size * 4 / 1e9, scratch))))
    return rows


def _teacher() -> list[Row]:
    rows: list[Row] = [
        ("teacher", "weights, GB in bfloat16", "in 8 bits", "in float32", "fits one device of 80 GB in bfloat16"),
        ("---", *["---:"] * 3, "---"),
    ]
    for name, size in TEACHERS.items():
        fits = "yes" if size * 2 < 0.8 * 80e9 else f"no: {-(-size * 2 // (0.8 * 80e9)):.0f} devices or more"
        rows.append((name, *(f"{size * each / 1e9:,.0f}" for each in (2, 1, 4)), fits))
    return rows


if __name__ == "__main__":
    main()
