"""Run the demo over several seeds: what distillation gains over cross-entropy alone, in paired runs.

python benchmarks/demo.py --seeds 3
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

from machine import keep

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run the demo, print its table, and write its results and the seconds of each stage to results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="runs/demo")
    flags = parser.parse_args()
    seeds = json.dumps(list(range(flags.seeds)))
    command = [str(Path(sys.executable).with_name("capgap")), "run", str(ROOT / "jobs/runs/demo.yaml")]
    subprocess.run([*command, "--seeds", seeds, "--out", flags.out], check=True)
    out = Path(flags.out)
    results = json.loads((out / "eval" / "results.json").read_text())
    manifests = [json.loads(path.read_text()) for path in sorted(out.rglob("manifest.json"))]
    figures = {
        "results": results,
        "stage_wall_s": {m["instance"]: m["wall_s"] for m in manifests},
        "cache_bytes_per_token": next(m["totals"]["bytes_per_token"] for m in manifests if m["stage"] == "cache"),
    }
    print(f"kept in {keep(f'demo-{flags.seeds}-seeds', 'cpu', figures)}")


if __name__ == "__main__":
    main()
