"""Bytes of text per token and bytes of disk per token of a corpus, for tokenizers of several sizes.

python benchmarks/corpus_sizes.py                              tokenizers of 512, 4,096 and 32,768 entries
python benchmarks/corpus_sizes.py --vocab-sizes 4096

The text is the documentation that Python carries, packed as in jobs/runs/demo.yaml.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import yaml
from machine import keep

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.facts import CorpusFacts
from capgap.schemas.run_file import RunFile

DEMO = Path(__file__).parents[1] / "jobs" / "runs" / "demo.yaml"


def main() -> None:
    """Measure each size of vocabulary, and write the figures to results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[512, 4096, 32768])
    print(keep("corpus-sizes", "cpu", [measure(size) for size in parser.parse_args().vocab_sizes]))


def measure(vocab_size: int) -> dict[str, Any]:
    """Make the demo's corpus with a tokenizer of that size, and return its bytes per token."""
    settings = yaml.safe_load(DEMO.read_text())
    settings["corpus"]["vocab_size"] = vocab_size
    with tempfile.TemporaryDirectory(prefix="capgap-corpus-") as folder:
        run = RunFile.model_validate({**settings, "out": folder})
        manifest = carry_out(run, Instance("corpus"))
    splits = CorpusFacts.model_validate(manifest.facts).splits.values()
    num_tokens = sum(part.num_tokens for part in manifest.shard_sets.values())
    num_bytes = sum(part.num_bytes for part in manifest.shard_sets.values())
    return {
        "text": settings["corpus"]["sources"],
        "vocab_size": vocab_size,
        "num_tokens": num_tokens,
        "text_bytes_per_token": round(
            sum(split.num_text_bytes for split in splits) / sum(split.num_text_tokens for split in splits), 4
        ),
        "stored_bytes_per_token": round(num_bytes / num_tokens, 4),
    }


if __name__ == "__main__":
    main()
