"""Gather the measured tables that `capgap plan` uses from benchmarks/results into the package.

python benchmarks/plan_tables.py        after new figures of benchmarks/store.py or benchmarks/corpus_sizes.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TABLE = Path(__file__).parents[1] / "pipeline" / "plan" / "measured.json"

CODECS, CORPUS = "store-codecs-amd-epyc.json", "corpus-sizes-amd-epyc.json"
# the demo has a small vocabulary and a flat teacher, and takes the most bytes per token of all
DEMO, DEMO_VOCAB_SIZE = "demo-3-seeds-amd-epyc.json", 4096


def table() -> dict[str, Any]:
    """Return the measured bytes per token from the results."""
    codecs = json.loads((RESULTS / CODECS).read_text())["figures"]
    corpus = json.loads((RESULTS / CORPUS).read_text())["figures"]
    demo = json.loads((RESULTS / DEMO).read_text())["figures"]["cache_bytes_per_token"]
    return {
        "cache": {
            "source": f"benchmarks/results/{CODECS} and {DEMO}",
            "num_samples": 50,
            "top_k": 64,
            "rows": [
                {name: row[name] for name in ("codec", "regime", "vocab_size", "entropy_nats", "bytes_per_token")}
                for row in codecs
                if row["codec"].startswith("sampled-planes") or row["codec"].startswith("topk-")
            ]
            + [
                {
                    "codec": "sampled-planes-1",
                    "regime": "natural",
                    "vocab_size": DEMO_VOCAB_SIZE,
                    "entropy_nats": None,
                    "bytes_per_token": demo,
                }
            ],
        },
        "corpus": {
            "source": f"benchmarks/results/{CORPUS}",
            "rows": [
                {name: row[name] for name in ("vocab_size", "text_bytes_per_token", "stored_bytes_per_token")}
                for row in corpus
            ],
        },
    }


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    TABLE.write_text(json.dumps(table(), indent=1) + "\n")
    print(TABLE)
