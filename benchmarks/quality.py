"""How much of the gain from distillation each recording keeps, at its bytes per token.

python benchmarks/quality.py                   on the demo: every training that is not in the results, then the table
python benchmarks/quality.py --run smol        on a real language model, which `make smol` fetches
python benchmarks/quality.py --run smol-adapted    the same with a teacher that was adapted to such text
python benchmarks/quality_page.py PAGE ...     put the tables into pages, between their marks
python benchmarks/quality.py --smoke           the same at the smallest size, to check that it works

Every training of a seed starts from the same weights, sees the same sequences in the same order and takes as many
steps; only the targets differ. The gain is the fall of the held-out loss from cross-entropy alone to online
distillation over the whole vocabulary, paired by seed. A finished training is a line of the results, and is not
repeated; a killed one continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import torch
import yaml
from independent_samples import independent_samples
from machine import RESULTS, machine
from made_once import made_once, shared_lock
from quality_arms import CACHES, RUNS, Arm, arms
from quality_page import table
from result_lines import Results
from transformers import PreTrainedModel

from capgap.pipeline.eval.compare import Comparison
from capgap.pipeline.eval.heldout import first_sequences, num_labels
from capgap.pipeline.eval.measure import score
from capgap.pipeline.eval.spool import Spool, open_spool
from capgap.pipeline.models.load import load_model, model_path
from capgap.pipeline.stage.context import StageInput
from capgap.pipeline.store import ShardReader, keep_freed_memory
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.objective import Objective
from capgap.pipeline.train.task import TrainingTask
from capgap.schemas.records import SampledTargets, Sequences
from capgap.schemas.run_eval import EvalSettings
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_train import TrainSettings

ROOT = Path(__file__).parents[1]
NUM_TOKENS_IN_SMOKE = 4_096


def main() -> None:
    """Run the trainings that the results lack, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-seed", type=int, help="train this seed only, so that several processes share the work")
    parser.add_argument("--run", choices=list(RUNS), default="demo", help="the run whose models and text are used")
    parser.add_argument("--tokens", type=int, help="tokens that every student sees; default: the run's")
    parser.add_argument("--work", type=Path, help="folder of the caches and trainings; default: runs/quality-RUN")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/quality-RUN.jsonl")
    parser.add_argument("--smoke", action="store_true", help="run at the smallest size, to check that everything works")
    flags = parser.parse_args()
    results = Results(flags.results or RESULTS / f"quality-{flags.run}.jsonl")
    bench = begun_bench(flags.work, flags.run, flags.smoke, flags.tokens)
    with bench.teacher_on_heldout() as heldout:
        # all seeds of one arm come before the next arm
        for arm, seed in itertools.product(arms(RUNS[flags.run].few), range(flags.seeds)):
            if flags.only_seed in (None, seed) and not results.has(arm.name, seed, bench.about):
                results.add(bench.train(arm, seed, heldout))
                print(f"{time.strftime('%H:%M:%S')} {arm.name}, seed {seed}: {results.lines[-1]}", flush=True)
    mine = [line for line in results.lines if line["about"] == bench.about]
    print("\n".join(" | ".join(row) for row in table(mine)))


def begun_bench(work: Path | None, name: str, smoke: bool, num_tokens: int | None = None) -> Bench:
    """Return the bench of a run, and prepare this process to train; `work` is `runs/quality-RUN` by default."""
    keep_freed_memory()
    work = work or Path(f"runs/quality-{name}")
    os.environ.setdefault("CAPGAP_LEASE_DIR", str((work / "leases").resolve()))
    return Bench(work, *taken(name, smoke, num_tokens))


def taken(name: str, smoke: bool, num_tokens: int | None = None) -> tuple[dict[str, Any], int]:
    """Return the settings of a run, and the number of tokens of every training."""
    if smoke:
        return yaml.safe_load((ROOT / "tests/assets/tiny.yaml").read_text()), num_tokens or NUM_TOKENS_IN_SMOKE
    run = yaml.safe_load((ROOT / f"jobs/runs/{RUNS[name].file}.yaml").read_text())
    changed = {part: run.get(part, {}) | changes for part, changes in RUNS[name].changes.items()}
    return run | changed, num_tokens or RUNS[name].num_tokens


@dataclass(frozen=True)
class Heldout:
    """Held-out sequences, the teacher's logprobs of the first `num_full` of them, and its loss in nats/token."""

    sequences: Sequences
    spool: Spool
    num_full: int
    teacher_loss: float


class Bench:
    """Makes caches when they are needed, and trains students from them.

    Args:
        work: Folder of the caches and trainings.
        run: A run file, whose corpus, teacher, student and training are used.
        num_tokens: Number of tokens of every training.

    Attributes:
        work: Folder of the caches and trainings.
        settings: Settings of every training.
        about: The settings that decide a line of the results; only lines with equal ones may be compared.
    """

    def __init__(self, work: Path, run: dict[str, Any], num_tokens: int) -> None:
        # without trainings, the run file need not say which recording they use
        self.work, self._run = (
            work,
            {name: part for name, part in run.items() if name not in ("train", "arms", "eval")},
        )
        self._eval = EvalSettings.model_validate(run.get("eval", {}))
        shared = RunFile.model_validate(self._run | {"out": str(work / "shared")})
        self._corpus, self._teacher = (made_once(shared, stage) for stage in ("corpus", "teacher"))
        self.settings = TrainSettings.model_validate(run["train"] | {"max_tokens": num_tokens})
        self._dtype: dict[str, str] = {"dtype": run["cache"]["dtype"]} if "dtype" in run["cache"] else {}
        self.about = {
            "teacher": self._teacher.manifest.content[:12],
            "corpus": self._corpus.manifest.content[:12],
            "num_tokens": num_tokens,
            "student": run["student"].get("model", run["student"]),
            "learning_rate": self.settings.learning_rate,
            "batch_sequences": self.settings.batch_sequences,
            "precision": self.settings.precision,
            **self._dtype,
        }

    @contextmanager
    def teacher_on_heldout(self) -> Iterator[Heldout]:
        """Keep the teacher's distributions on held-out text on disk while students are measured."""
        settings = self._eval
        heldout = self._corpus.manifest.shard_sets["heldout"]
        sequences = first_sequences(self._corpus.path, heldout, settings.num_sequences)
        num_full = min(settings.num_full_sequences, len(sequences))
        labels_S = num_labels(sequences)
        self.work.mkdir(parents=True, exist_ok=True)
        with open_spool(self.work, int(labels_S[:num_full].sum()), self._vocab_size) as spool:
            nats = self._score(self.teacher(), sequences, spool.append, num_full)
            yield Heldout(sequences, spool, num_full, nats)

    def train(self, arm: Arm, seed: int, heldout: Heldout) -> dict[str, Any]:
        """Train and measure one student, and return its line of the results."""
        reader = self.reader(arm)
        name = f"{arm.name} seed {seed}".replace(",", "").replace(" ", "-")
        folder = self.work / "train" / name
        folder.mkdir(parents=True, exist_ok=True)
        is_whole = not any(folder.iterdir())
        model = self.student(seed)
        started, cpu_started = time.perf_counter(), time.process_time()
        totals = fit(
            model,
            TrainingTask(
                title=name,
                settings=self.settings,
                training=reader,
                heldout=ShardReader(self._corpus.path, self._corpus.manifest.shard_sets["heldout"]),
                alpha=arm.alpha,
                temperature=1.0,
                seed=seed,
                device="cpu",
                folder=folder,
                objective=Objective(tail=arm.tail),
                teacher=self.teacher() if arm.online else None,
            ),
        )
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
        shutil.rmtree(folder)  # its checkpoints are not needed any more
        return {
            "arm": arm.name,
            "seed": seed,
            **self.measured(arm.name, model, heldout),
            "bytes_per_token": None if arm.alpha == 0 or arm.online else _bytes_per_token(reader),
            "ids_per_token": None if arm.alpha == 0 or arm.online else _ids_per_token(reader),
            "num_steps": totals["num_steps"],
            # this process has only timed a part of a training that continued from a checkpoint
            "wall_s": round(wall_s, 1) if is_whole else None,
            "cpu_s": round(cpu_s, 1) if is_whole else None,
            "about": self.about,
            "machine": machine("cpu"),
        }

    def measured(self, name: str, model: PreTrainedModel, heldout: Heldout) -> dict[str, Any]:
        """Return the figures of a trained student for its line of the results."""
        comparison = Comparison(heldout.spool)
        loss = self._score(model.eval(), heldout.sequences, comparison.add, heldout.num_full)
        against = comparison.result(name).model_dump()
        return {"heldout_loss": loss, "against_teacher": against, "teacher_loss": heldout.teacher_loss}

    @property
    def teacher_folder(self) -> str:
        """Folder of the teacher's weights."""
        return str(model_path(self._teacher))

    def teacher(self) -> PreTrainedModel:
        """Load the teacher in the dtype in which it made the caches."""
        dtype = getattr(torch, self._dtype["dtype"]) if self._dtype else None
        return load_model(model_path(self._teacher), "cpu", dtype)

    @property
    def _vocab_size(self) -> int:
        return int(self._corpus.manifest.facts["tokenizer"]["vocab_size"])  # type: ignore[index,call-overload,arg-type]

    def reader(self, arm: Arm) -> ShardReader:
        """Return a reader of the cache that an arm learns from, which is made if it is missing."""
        cache = self._cache(arm.cache)
        reader = ShardReader(cache.path, cache.manifest.shard_sets[arm.recording])
        if not arm.independent:
            return reader
        with shared_lock(self.work):
            return independent_samples(reader, self.teacher(), self.work / f"independent-{arm.cache}")

    def _cache(self, name: str) -> StageInput:
        settings = {"engine": "transformers", "max_tokens": self.settings.max_tokens, "num_heldout_sequences": 0}
        settings |= CACHES[name] | self._dtype
        out = self.work / f"cache-{name.replace(' ', '-')}"
        reuse = {"corpus": str(self._corpus.path), "teacher": str(self._teacher.path)}
        return made_once(
            RunFile.model_validate(self._run | {"out": str(out), "reuse": reuse, "cache": settings}), "cache"
        )

    def student(self, seed: int) -> PreTrainedModel:
        """Return the student before its first step, as the student stage makes it."""
        inputs = {"corpus": self._corpus, "teacher": self._teacher, "cache": self._cache("50")}
        reuse = {name: str(there.path) for name, there in inputs.items()}
        run = RunFile.model_validate(self._run | {"out": str(self.work / "students"), "reuse": reuse, "seeds": [seed]})
        return load_model(model_path(made_once(run, "student", seed)), "cpu", torch.float32)

    def _score(self, model: Any, sequences: Sequences, visit: Callable[..., None], num_full: int) -> float:
        nats_S = score(
            model,
            sequences,
            name="held-out",
            vocab_size=self._vocab_size,
            batch_sequences=16,
            visit=visit,
            num_visited=num_full,
        )
        return float(nats_S.sum() / num_labels(sequences).sum())


def _bytes_per_token(reader: ShardReader) -> float:
    return round(reader.shard_set.num_bytes / reader.shard_set.num_tokens, 2)


def _ids_per_token(reader: ShardReader) -> float:
    """Return the mean number of distinct ids per row in the first member."""
    _, targets = reader.read_member(0, 0)
    if isinstance(targets, SampledTargets):
        return round(float(targets.num_ids_BL.mean()), 2)
    return float(reader.codec.num_ids)


if __name__ == "__main__":
    main()
