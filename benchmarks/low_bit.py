"""How much of the loss from quantisation a training recovers: from a cache, from text alone, from the teacher itself.

python benchmarks/low_bit.py                     every training that is not in the results, then the table
python benchmarks/low_bit.py --formats mxfp4     the trainings of one format
python benchmarks/low_bit.py --only-seed 0       the trainings of one seed, so that several processes share the work
python benchmarks/low_bit.py --smoke             the same at the smallest size, to check that it works
python benchmarks/low_bit_page.py                put the tables into their page, between its marks

The student is the quantised teacher itself, SmolLM2-135M-Instruct, which `make smol` fetches. Every training of a
format sees the same sequences and takes as many steps; the seed decides the order of the data. A training runs in a
process of its own, so that its memory and CPU seconds are known. A finished training is a line of the results, and is
not repeated. A killed one continues from its last checkpoint, and its line then has no seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import yaml
from low_bit_page import NAMES, ONLINE, PTQ, QAT, TAILS, tables
from machine import RESULTS, machine, mixed_precision
from made_once import made_once
from quality import Heldout
from result_lines import Results

from capgap.pipeline.eval.compare import Comparison
from capgap.pipeline.eval.heldout import first_sequences, num_labels
from capgap.pipeline.eval.measure import score
from capgap.pipeline.eval.spool import open_spool
from capgap.pipeline.models.load import load_model, model_path
from capgap.pipeline.stage.context import Instance, StageInput
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.run_eval import EvalSettings
from capgap.schemas.run_file import RunFile

ROOT = Path(__file__).parents[1]
# 10 steps: one core without 16-bit products needs three hours for two formats at three seeds.
NUM_TOKENS = 10_240
# The better of two that were tried: after 8 steps, the online arm of mxfp4 had a lower loss and KL than with 1e-4,
# which `--formats mxfp4 --only-seed 0 --tokens 8192 --learning-rate 1e-4` repeats.
LEARNING_RATE = 2e-4
Job = tuple[str, str, int]
# Each cache is one pass of the teacher.
CACHES: dict[str, dict[str, Any]] = {
    "50": {"recording": "sampled", "num_samples": 50},
    "25": {"recording": "both", "num_samples": 25, "top_k": 64},
}
# By name: the cache, and the settings of the training.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    PTQ: ("50", {"alpha": 0.0, "max_tokens": 0}),
    QAT: ("50", {"alpha": 0.0}),
    "QAD, sampled, n = 50": ("50", {"recording": "sampled"}),
    ONLINE: ("50", {"targets": "online"}),
    "QAD, sampled, n = 25": ("25", {"recording": "sampled"}),
    **{f"QAD, top-64, {tail}": ("25", {"recording": "topk", "tail": tail}) for tail in TAILS},
}
NUM_FIRST = 6  # number of arms up to the first tail; the other tails are trained with one seed only
FORMATS: dict[str, dict[str, Any]] = {
    "int4": {"format": "int4", "group_size": 32},
    "mxfp4": {"format": "mxfp4"},
    "nvfp4": {"format": "nvfp4"},
    "int8": {"format": "int8"},
    "fp8": {"format": "fp8"},
}


# Changes to the run file that make every training shorter: the file is meant for one training, and here are dozens.
PRECISION = mixed_precision("cpu")
SHORTER: dict[str, dict[str, Any]] = {
    "corpus": {"shard_sequences": 20},
    "cache": {"dtype": "bfloat16" if PRECISION == "bf16-mixed" else "float32", "num_heldout_sequences": 0},
    "train": {"precision": PRECISION, "batch_sequences": 2, "num_validation_sequences": 1},
    "eval": {"num_sequences": 16, "num_full_sequences": 16},
}


def main() -> None:
    """Run the trainings that the results lack, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-seed", type=int, help="train this seed only, so that several processes share the work")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=["int4", "mxfp4"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, help="tokens that every student sees")
    parser.add_argument("--compile", action="store_true", help="compile what is between the quantised layers")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/low-bit-arms"), help="folder of the caches and trainings"
    )
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/low-bit.jsonl")
    parser.add_argument("--smoke", action="store_true", help="run at the smallest size, to check that everything works")
    parser.add_argument("--train", nargs=3, metavar=("RUN", "ARM", "SEED"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    # processes that share the work must not wait for each other's lease of the device, only for each other's caches
    leases = "leases" if flags.only_seed is None else f"leases-{flags.only_seed}"
    os.environ.setdefault("CAPGAP_LEASE_DIR", str((flags.work / leases).resolve()))
    if flags.train:
        _train(Path(flags.train[0]), flags.train[1], int(flags.train[2]))
        return
    if flags.smoke:
        flags.tokens = 4096
    results = Results(flags.results or RESULTS / ("low-bit-smoke.jsonl" if flags.smoke else "low-bit.jsonl"))
    bench = Bench(flags.work, flags.smoke, flags.tokens, flags.learning_rate, flags.compile)
    with bench.teacher_on_heldout() as heldout:
        for name, arm, seed in in_order(flags.formats, flags.arms, flags.seeds):
            about = bench.about | {"format": FORMATS[name]}
            if flags.only_seed in (None, seed) and not results.has(arm, seed, about):
                results.add(bench.line(name, arm, seed, heldout) | {"about": about})
                print(f"{name}, {arm}, seed {seed}: {results.lines[-1]}", flush=True)
    mine = [line for line in results.lines if line["about"] == bench.about | {"format": line["about"]["format"]}]
    for name, rows in tables(mine).items():
        print("\n".join((f"\n{name}", *(" | ".join(row) for row in rows))))


def in_order(formats: list[str], chosen: list[str], num_seeds: int) -> list[Job]:
    """Return the jobs: first the arms that the goal compares, at every seed, then the other tails at one seed."""
    # PTQ is not trained, so it is the same at every seed
    wanted = [
        (name, arm, seed)
        for seed, name, arm in itertools.product(range(num_seeds), formats, chosen)
        if seed == 0 or (arm != PTQ and NAMES.index(arm) < NUM_FIRST)
    ]
    return sorted(wanted, key=lambda job: NAMES.index(job[1]) >= NUM_FIRST)


class Bench:
    """Makes caches when they are needed, and trains students from them.

    Args:
        work: Folder of the caches and trainings.
        smoke: Whether everything has the smallest size.
        num_tokens: Number of tokens of every training.
        learning_rate: Learning rate of every training.
        compiles: Whether the parts between the quantised layers are compiled.
    """

    def __init__(
        self, work: Path, smoke: bool, num_tokens: int, learning_rate: float = LEARNING_RATE, compiles: bool = False
    ) -> None:
        file = ROOT / ("tests/assets/tiny.yaml" if smoke else "jobs/runs/low-bit.yaml")
        self._work, self._run = work, yaml.safe_load(file.read_text())
        for part, settings in ({} if smoke else SHORTER).items():
            self._run[part] |= settings
        self._run["train"] |= {"compile": compiles, "learning_rate": learning_rate}
        self._run |= {"device": "cpu", "out": str(work / "shared")}
        self._corpus, self._teacher = (self._shared({}, stage) for stage in ("corpus", "teacher"))
        path = model_path(self._teacher)
        self._run["student"] = {"path": path}
        self._run["train"] |= {"max_tokens": num_tokens, "recording": None, "loggers": []}
        self._run["cache"] |= {"engine": "transformers", "max_tokens": num_tokens}
        self.about = {
            "teacher": self._teacher.manifest.content[:12],
            "corpus": self._corpus.manifest.content[:12],
            "num_tokens": num_tokens,
            "learning_rate": learning_rate,
            "batch_sequences": self._run["train"].get("batch_sequences"),
            "precision": self._run["train"].get("precision"),
        }

    @contextmanager
    def teacher_on_heldout(self) -> Iterator[Heldout]:
        """Keep the teacher's distributions on held-out text on disk while students are measured."""
        settings = EvalSettings.model_validate(self._run.get("eval", {}))
        sequences = first_sequences(
            self._corpus.path, self._corpus.manifest.shard_sets["heldout"], settings.num_sequences
        )
        num_full = min(settings.num_full_sequences, len(sequences))
        labels = int(num_labels(sequences)[:num_full].sum())
        with open_spool(self._work, labels, self._vocab_size) as spool:
            waiting = Heldout(sequences, spool, num_full, 0.0)
            loss = self._loss(model_path(self._teacher), waiting, spool.append)
            yield Heldout(sequences, spool, num_full, loss)

    def line(self, name: str, arm: str, seed: int, heldout: Heldout) -> dict[str, Any]:
        """Train and measure one student, and return its line of the results."""
        cache, settings = ARMS[arm]
        run = self._run_of(name, cache, arm, settings, seed)
        file = Path(run["out"]) / f"{slug(arm)}-{seed}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(run))
        command = [sys.executable, __file__, "--work", str(self._work), "--train", str(file), slug(arm), str(seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        cost = json.loads(done.stdout.splitlines()[-1])
        instance = Instance("train", slug(arm), seed)
        # the training is finished, so this only reads its manifest
        trained = StageInput(Path(run["out"]) / instance.name, carry_out(RunFile.model_validate(run), instance))
        comparison = Comparison(heldout.spool)
        loss = self._loss(model_path(trained), heldout, comparison.add)
        recording, made = settings.get("recording"), self._cache(cache).manifest.shard_sets
        bytes_per_token = None
        if recording is not None:
            bytes_per_token = round(made[recording].num_bytes / made[recording].num_tokens, 2)
        return {
            "arm": arm,
            "seed": seed,
            "heldout_loss": loss,
            "perplexity": math.exp(loss),
            "against_teacher": comparison.result(arm).model_dump(),
            "teacher_loss": heldout.teacher_loss,
            "bytes_per_token": bytes_per_token,
            "num_steps": trained.manifest.totals["num_steps"],
            **cost,
            "machine": machine("cpu"),
        }

    def _run_of(self, name: str, cache: str, arm: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        shared = {"corpus": self._corpus, "teacher": self._teacher, "cache": self._cache(cache)}
        out = trained_in(self._work, name, arm)
        return self._run | {
            "out": str(out),
            "reuse": {stage: str(made.path) for stage, made in shared.items()},
            "student": self._run["student"] | {"quantize": FORMATS[name]},
            "train": self._run["train"] | {"recording": "sampled"},
            "arms": {slug(arm): settings},
            "seeds": [seed],
        }

    def _cache(self, name: str) -> StageInput:
        reuse = {"corpus": str(self._corpus.path), "teacher": str(self._teacher.path)}
        settings = {key: value for key, value in self._run["cache"].items() if key not in ("top_k", "num_samples")}
        run = {"out": str(self._work / f"cache-{name}"), "reuse": reuse, "cache": settings | CACHES[name]}
        return self._shared(run, "cache")

    def _shared(self, run: dict[str, Any], stage: str) -> StageInput:
        """Make a stage that all trainings share; it does not depend on arms, so one arm stands in for them."""
        return made_once(RunFile.model_validate(self._run | run | {"arms": {"any": {"alpha": 0.0}}}), stage)

    @property
    def _vocab_size(self) -> int:
        return int(self._corpus.manifest.facts["tokenizer"]["vocab_size"])  # type: ignore[index,call-overload,arg-type]

    def _loss(self, path: str, heldout: Heldout, visit: Any) -> float:
        nats_S = score(
            load_model(path, "cpu", "fast"),
            heldout.sequences,
            name="held-out",
            vocab_size=self._vocab_size,
            batch_sequences=4,
            visit=visit,
            num_visited=heldout.num_full,
        )
        return float(nats_S.sum() / num_labels(heldout.sequences).sum())


def trained_in(work: Path, name: str, arm: str) -> Path:
    """Return the folder of the run in which an arm of a format is trained."""
    return work / name / f"cache-{ARMS[arm][0]}"


def slug(arm: str) -> str:
    """Return an arm's name in the form that folder names take."""
    return re.sub(r"[^a-z0-9]+", "-", arm.lower()).strip("-")


def _train(file: Path, arm: str, seed: int) -> None:
    """Run one training in this process, and print its seconds and its peak memory."""
    run = RunFile.model_validate_json(file.read_text())
    carry_out(run, Instance("student", seed=seed))
    instance = Instance("train", arm, seed)
    is_whole = not (Path(run.out) / instance.name).exists()
    cpu_started = time.process_time()
    manifest = carry_out(run, instance)
    took = {"wall_s": round(manifest.wall_s, 1), "cpu_s": round(time.process_time() - cpu_started, 1)}
    # this process has only timed a part of a training that continued from a checkpoint
    cost: dict[str, float | None] = dict(took) if is_whole else dict.fromkeys(took)
    print(json.dumps(cost | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
