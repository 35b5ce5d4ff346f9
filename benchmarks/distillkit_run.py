"""Run DistillKit's own capture, packing and training on given rows, without a network; benchmarks/peers.py starts it.

This script needs DistillKit's dependencies and nothing of capgap. It changes DistillKit in three ways: the rows are
given as tokens in place of a dataset's text, the training sees them in the given order, and each command ends by
printing its seconds as one line of JSON. Capture and training may run in two environments, because vLLM and the
releases of transformers and TRL that the training needs can seldom be installed together.
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
    """Run one command, and print what it measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["capture", "pack", "train"])
    parser.add_argument("--distillkit", type=Path, required=True, help="folder of a checkout of DistillKit")
    parser.add_argument("--rows", type=Path, help="Parquet whose input_ids are captured or give the order")
    parser.add_argument("--model", help="the teacher's folder")
    parser.add_argument("--config", type=Path, help="configuration of the compression or of the training")
    parser.add_argument("--captures", type=Path, help="what `capture` wrote")
    parser.add_argument("--length", type=int, help="tokens of a row")
    parser.add_argument("--out", type=Path, help="folder to write")
    flags = parser.parse_args()
    sys.path.insert(0, str(flags.distillkit))
    print(json.dumps({"capture": capture, "pack": pack, "train": train}[flags.what](flags)))


def capture(flags: argparse.Namespace) -> dict[str, Any]:
    """Run `distillkit.sample_logits_vllm` on the rows of a Parquet file; return its bytes and seconds."""
    import datasets
    from distillkit import sample_logits_vllm

    rows = datasets.Dataset.from_parquet(str(flags.rows))
    sample_logits_vllm.load_preprocess_data = lambda **unused: rows
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all work is done and timed in this process
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # OMP_NUM_THREADS sets the number of threads
    whole, after_start = Clock(), Clock()
    make = sample_logits_vllm.vllm.LLM

    def engine(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        after_start.start()
        return made

    sample_logits_vllm.vllm.LLM = engine
    arguments = {"model": flags.model, "dataset": "rows", "output": str(flags.out), "dtype": "bfloat16"}
    # on a CPU this is a share of main memory, most of which the default would take
    arguments |= {"gpu-memory-utilization": "0.2"}
    arguments |= {"compression-config": str(flags.config), "max-model-len": str(flags.length + 8)}
    whole.start()
    sample_logits_vllm.sample_logits.main(
        [word for name, value in arguments.items() for word in (f"--{name}", value)], standalone_mode=False
    )
    num_bytes = sum(one.stat().st_size for one in flags.out.glob("*.parquet"))
    return {"num_bytes": num_bytes, "with_start": whole.seconds(), "after_start": after_start.seconds()}


def pack(flags: argparse.Namespace) -> dict[str, Any]:
    """Run `distillkit.pack_logits` on the captures, and put its rows into the order of `--rows`."""
    import datasets
    from distillkit.pack_logits import iterative_packing

    captures = datasets.Dataset.from_parquet([str(one) for one in sorted(flags.captures.glob("*.parquet"))])
    packed = iterative_packing(captures, flags.length)
    places = {tuple(tokens): place for place, tokens in enumerate(packed["input_ids"])}
    wanted = datasets.Dataset.from_parquet(str(flags.rows))["input_ids"]
    packed.select([places[tuple(tokens[: flags.length])] for tokens in wanted]).save_to_disk(str(flags.out))
    return {"num_rows": len(wanted)}


def train(flags: argparse.Namespace) -> dict[str, Any]:
    """Run `distillkit.main.do_distill` with its own trainer and losses; return the seconds of the training."""
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
    """Measures wall and CPU seconds of this process."""

    def start(self) -> None:
        """Begin to measure."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        """Return the seconds since `start`."""
        wall_s, cpu_s = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {"wall_s": round(wall_s, 1), "cpu_s": round(cpu_s, 1)}


if __name__ == "__main__":
    main()
