"""DistillKit's own capture, packing and training, on given rows and without a network; benchmarks/peers.py calls it.

It runs where DistillKit's dependencies are and needs nothing of capgap. What is not DistillKit's own is said here: the
rows are given as tokens in the place of a dataset's text, the training sees them in the order in which they are given,
and each command prints its seconds as one line of JSON at the end. vLLM, which captures, and the releases of
transformers and TRL that the training wants are seldom found in one environment, so that each has its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Do it, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["capture", "pack", "train"])
    parser.add_argument("--distillkit", type=Path, required=True, help="a checkout")
    parser.add_argument("--rows", type=Path, help="Parquet whose input_ids are captured or give the order")
    parser.add_argument("--model", help="the teacher's folder")
    parser.add_argument("--config", type=Path, help="of the compression, or of the training")
    parser.add_argument("--captures", type=Path, help="what `capture` wrote")
    parser.add_argument("--length", type=int, help="tokens of a row")
    parser.add_argument("--out", type=Path, help="folder to write")
    flags = parser.parse_args()
    sys.path.insert(0, str(flags.distillkit))
    print(json.dumps({"capture": capture, "pack": pack, "train": train}[flags.what](flags)))


def capture(flags: argparse.Namespace) -> dict[str, Any]:
    """`distillkit.sample_logits_vllm` on the rows of a Parquet file."""
    import datasets
    from distillkit import sample_logits_vllm

    rows = datasets.Dataset.from_parquet(str(flags.rows))
    sample_logits_vllm.load_preprocess_data = lambda **unused: rows
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that this process's seconds are all of them
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # OMP_NUM_THREADS says how many
    whole, after_start = Clock(), Clock()
    make = sample_logits_vllm.vllm.LLM

    def engine(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        after_start.start()
        return made

    sample_logits_vllm.vllm.LLM = engine
    arguments = {"model": flags.model, "dataset": "rows", "output": str(flags.out), "dtype": "bfloat16"}
    # on a CPU that is a share of its memory, and the default the most of it
    arguments |= {"gpu-memory-utilization": "0.2"}
    arguments |= {"compression-config": str(flags.config), "max-model-len": str(flags.length + 8)}
    whole.start()
    sample_logits_vllm.sample_logits.main(
        [word for name, value in arguments.items() for word in (f"--{name}", value)], standalone_mode=False
    )
    num_bytes = sum(one.stat().st_size for one in flags.out.glob("*.parquet"))
    return {"num_bytes": num_bytes, "with_start": whole.seconds(), "after_start": after_start.seconds()}


def pack(flags: argparse.Namespace) -> dict[str, Any]:
    """`distillkit.pack_logits` on the captures; then its rows in the order of `--rows`."""
    import datasets
    from distillkit.pack_logits import iterative_packing

    captures = datasets.Dataset.from_parquet([str(one) for one in sorted(flags.captures.glob("*.parquet"))])
    packed = iterative_packing(captures, flags.length)
    places = {tuple(tokens): place for place, tokens in enumerate(packed["input_ids"])}
    wanted = datasets.Dataset.from_parquet(str(flags.rows))["input_ids"]
    packed.select([places[tuple(tokens[: flags.length])] for tokens in wanted]).save_to_disk(str(flags.out))
    return {"num_rows": len(wanted)}


def train(flags: argparse.Namespace) -> dict[str, Any]:
    """`distillkit.main.do_distill` with its own trainer and losses."""
    import torch
    import yaml
    from distillkit import main as distillkit
    from distillkit.configuration import DistillationRunConfig

    trainer = distillkit.DistillationTrainer
    trainer._get_train_sampler = lambda self, *unused: torch.utils.data.SequentialSampler(self.train_dataset)
    steps = Clock()
    own, taken = trainer.train, {}

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.start()
        done = own(self, *args, **kwargs)
        taken.update(steps.seconds())
        return done

    trainer.train = timed
    distillkit.do_distill(DistillationRunConfig.model_validate(yaml.safe_load(flags.config.read_text())))
    return taken


class Clock:
    """Wall and CPU seconds of this process."""

    def start(self) -> None:
        """From here on."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        """Up to now."""
        wall_s, cpu_s = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {"wall_s": round(wall_s, 1), "cpu_s": round(cpu_s, 1)}


if __name__ == "__main__":
    main()
