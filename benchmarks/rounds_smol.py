"""A real model in rounds: how near a student comes to its teacher on the student's own text, and the time of a round.

python benchmarks/rounds_smol.py               every seed that is not in the results, then the tables
python benchmarks/rounds_smol.py --smoke --models FOLDER      the same at the smallest size, with a model `tiny` there
python benchmarks/rounds_page.py               the tables of docs/rounds.md

SmolLM2-135M-Instruct (`python benchmarks/real_models.py`) teaches a student that is pruned from it to 6 of its 30
layers. The prompts are questions about the section titles of Django's documentation. The teacher answers them in round
0, and the student in the other rounds. Each stage runs in a process of its own, as in `capgap run`; its wall and CPU
seconds are those of that process, with start and imports. A finished seed is a line of the results.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from machine import RESULTS, machine
from real_models import FOLDER
from result_lines import Results
from rounds_page import smol_tables

from capgap.pipeline.eval.compare import Comparison
from capgap.pipeline.eval.heldout import first_sequences, num_labels
from capgap.pipeline.eval.measure import Visit, score
from capgap.pipeline.eval.spool import Spool, open_spool
from capgap.pipeline.generate.answers_file import WriterLogprobs
from capgap.pipeline.models.load import load_model
from capgap.pipeline.stage.context import FINAL, Instance
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import keep_freed_memory
from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.workflow.driver import start_afresh, walk
from capgap.pipeline.workflow.graph import instances
from capgap.schemas.manifest import Manifest
from capgap.schemas.records import Sequences
from capgap.schemas.run_file import RunFile

ARM = "distilled"
QUESTION = 'In Django, what is meant by "{}"? Answer in one short sentence.'
TITLES = re.compile(r"^(\w[\w ,()'-]{6,40})\n[=~-]{6,}$", re.MULTILINE)


def main() -> None:
    """Run the seeds that the results lack, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", type=Path, default=FOLDER, help="folder of the teacher and the documentation")
    parser.add_argument("--work", type=Path, default=Path("runs/rounds-smol"), help="folder of the run")
    parser.add_argument("--results", type=Path, default=RESULTS / "rounds-smol.jsonl")
    parser.add_argument("--smoke", action="store_true", help="run at the smallest size, to check that everything works")
    flags = parser.parse_args()
    keep_freed_memory()
    os.environ.setdefault("CAPGAP_LEASE_DIR", str((flags.work / "leases").resolve()))
    bench = Bench(flags.work, flags.models, SMOKE if flags.smoke else Size())
    results = Results(flags.results)
    for seed in range(flags.seeds):
        if not results.has(ARM, seed, bench.about):
            bench.make(seed)
            results.add({"arm": ARM, "seed": seed, **bench.measured(seed), "about": bench.about})
            print(f"{time.strftime('%H:%M:%S')} seed {seed}: {results.lines[-1]}", flush=True)
    for rows in smol_tables(results.lines).values():
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))


@dataclass(frozen=True)
class Size:
    """The teacher, and the sizes of the student, the rounds and the trainings."""

    teacher: str = "SmolLM2-135M-Instruct"
    num_layers: int = 6
    num_rounds: int = 4
    prompts_per_round: int = 96
    num_heldout: int = 24
    max_new_tokens: int = 48
    seq_len: int = 128
    round_tokens: int = 24_576
    engine: str = "vllm"


SMOKE = Size("tiny", 1, 2, 8, 4, 12, 96, 768, "transformers")


class Bench:
    """The run that all seeds share, with the teacher's text of round 0.

    Args:
        work: Folder of the prompts and the run.
        models: Folder that holds the teacher and the documentation.
        size: The teacher, and the sizes of the student, the rounds and the trainings.
    """

    def __init__(self, work: Path, models: Path, size: Size) -> None:
        self.work, self.models, self.size = work, models, size
        self.about = asdict(size) | {"machine": machine("cpu")["device"], "num_threads": torch.get_num_threads()}
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "prompts.jsonl").is_file():
            files = sorted((models / "django-documentation").rglob("*.txt"))
            titles = sorted({title for file in files for title in TITLES.findall(file.read_text())})
            # shuffled, so that every round has titles from the whole documentation
            random.Random(0).shuffle(titles)
            asked = [{"role": "user", "content": QUESTION.format(title)} for title in titles]
            lines = [json.dumps({"messages": [one]}) for one in asked]
            write_atomically(work / "prompts.jsonl", "".join(line + "\n" for line in lines))

    @property
    def out(self) -> Path:
        """Folder of the run."""
        return self.work / "out"

    def run(self, seed: int) -> RunFile:
        """Return the run file of a seed."""
        size = self.size
        teacher = str(self.models / size.teacher)
        return RunFile.model_validate(
            {
                "name": "rounds-smol",
                "out": str(self.out),
                "device": "cpu",
                "seeds": [seed],
                "corpus": {
                    "sources": [str(self.models / "django-documentation")],
                    "tokenizer": teacher,
                    "seq_len": size.seq_len,
                    "context": "document",
                    "teacher_fraction": 0.0,
                    "heldout_fraction": 0.06,
                },
                "teacher": {"path": teacher},
                "rounds": {
                    "prompts": str(self.work / "prompts.jsonl"),
                    "num": size.num_rounds,
                    "prompts_per_round": size.prompts_per_round,
                    "num_heldout_prompts": size.num_heldout,
                    "max_new_tokens": size.max_new_tokens,
                    "engine": size.engine,
                    "dtype": "float32",
                },
                "cache": {"engine": "transformers", "dtype": "float32", "recording": "sampled"},
                "student": {"prune": {"num_layers": size.num_layers, "num_sequences": 64}},
                # every round trains on the same number of tokens, however long its answers are
                "train": {
                    "learning_rate": 5e-4,
                    "precision": "bf16-mixed",
                    "batch_sequences": 4,
                    "num_epochs": 1000,
                    "max_tokens": size.round_tokens,
                    "loggers": [],
                },
                # the section makes the final students write answers; this script measures them itself
                "eval": {},
            }
        )

    def make(self, seed: int) -> None:
        """Make every stage of the seed except `eval` and `report`, and append each one's seconds to took.jsonl."""
        run = self.run(seed)
        chosen = [one for one in instances(run) if one.stage not in ("eval", "report")]

        def start(arguments: Sequence[str]) -> int:
            spent, began = _children_s(), time.monotonic()
            code = start_afresh(arguments)
            took = {"wall_s": round(time.monotonic() - began, 1), "cpu_s": round(_children_s() - spent, 1)}
            with (self.work / "took.jsonl").open("a") as file:
                file.write(json.dumps({"name": arguments[arguments.index("--instance") + 1]} | took) + "\n")
            return code

        walk(run, chosen, log=lambda name, why: print(f"{name}: {why}", file=sys.stderr), start=start)

    def measured(self, seed: int) -> dict[str, Any]:
        """Return how near the students of all rounds are to the teacher, and the seconds of every stage."""
        numbers = range(self.size.num_rounds)
        folders = [str(self.out / Instance("train", ARM, seed, one).name / "model") for one in numbers]
        texts = [Instance("generate", ARM, seed, one) for one in (*numbers[1:], FINAL)]
        teacher = load_model(str(self.models / self.size.teacher), "cpu", torch.float32)
        own = [self._heldout(one) for one in texts]
        # the teacher's text, and the student's texts after the first and after the last round
        common = [self._heldout(Instance("generate", round=0)), own[0], own[-1]]
        kl_own, rms = [], []
        for folder, text in zip(folders, own, strict=True):
            (near,) = self._near(teacher, [folder], [text])
            kl_own.append(near.result(folder).kl)
            rms.append(float(torch.cat(near.off).square().mean().sqrt()))
        caches = [self._totals(Instance("cache", ARM, seed, one).name) for one in numbers[1:]]
        written = [self._totals(one.name) for one in texts]
        return {
            "kl_own_by_round": kl_own,
            "kl_common_by_round": [near.result("common").kl for near in self._near(teacher, folders, common)],
            "writer_kl_by_round": [one["writer_kl"] for one in caches],
            "logprob_rms_by_round": rms,
            "heldout_tokens_by_round": [one["heldout_answer_tokens"] for one in written],
            "heldout_cut_off_by_round": [one["heldout_cut_off"] for one in written],
            "train_tokens": [self._totals(Instance("train", ARM, seed, one).name)["num_tokens"] for one in numbers],
            "took": self._took(seed),
        }

    def _near(self, teacher: Any, folders: Sequence[str], texts: Sequence[Text]) -> list[Nearness]:
        """Compare each student with the teacher on all of these texts."""
        vocab_size = int(teacher.config.vocab_size)
        sequences = Sequences.joined([one.sequences for one in texts])
        found = []
        with open_spool(self.work, int(num_labels(sequences).sum()), vocab_size) as spool:

            def visited(model: Any, visit: Visit) -> None:
                score(
                    model,
                    sequences,
                    name="held-out answers",
                    vocab_size=vocab_size,
                    batch_sequences=16,
                    context="document",
                    visit=visit,
                    num_visited=len(sequences),
                )

            visited(teacher, spool.append)
            for folder in folders:
                found.append(Nearness(spool, texts))
                visited(load_model(folder, "cpu", torch.float32), found[-1].add)
        return found

    def _heldout(self, instance: Instance) -> Text:
        """Read the held-out answers of a text, which are one shard, with their writer's logprobs."""
        folder = self.out / instance.name
        shards = _manifest(folder).shard_sets["heldout"]
        sequences = first_sequences(folder, shards, shards.num_sequences)
        logprobs = WriterLogprobs(folder, shards)
        rows = [logprobs(0, row) for row in range(len(sequences))]
        return Text(sequences, torch.from_numpy(np.concatenate([row[~np.isnan(row)] for row in rows])))

    def _totals(self, name: str) -> dict[str, Any]:
        return _manifest(self.out / name).totals

    def _took(self, seed: int) -> dict[str, dict[str, float]]:
        """Return the wall and CPU seconds of the last process of each stage of the seed's run."""
        lines = [json.loads(line) for line in (self.work / "took.jsonl").read_text().splitlines()]
        names = [one.name for one in instances(self.run(seed))]
        return {one.pop("name"): one for one in lines if one["name"] in names}


@dataclass(frozen=True)
class Text:
    """Answers, and the logprobs with which their writer sampled their tokens [N]."""

    sequences: Sequences
    logprobs_N: torch.Tensor

    def labels(self) -> torch.Tensor:
        """Return the tokens of the answers, in order [N]."""
        tokens_BL, mask_BL = self.sequences.tokens_BL1[:, 1:], self.sequences.mask_BL1[:, 1:]
        return torch.from_numpy(tokens_BL[mask_BL]).long()


class Nearness(Comparison):
    """A comparison that also collects the differences of a model's logprobs of the tokens from the stored ones."""

    def __init__(self, spool: Spool, texts: Sequence[Text]) -> None:
        super().__init__(spool)
        self._labels_N = torch.cat([one.labels() for one in texts])
        self._stored_N = torch.cat([one.logprobs_N for one in texts])
        self.off: list[torch.Tensor] = []

    def add(self, logprobs_NV: torch.Tensor) -> None:
        """Compare the model's next rows (see `Comparison.add`), and collect the differences of their logprobs."""
        super().add(logprobs_NV)
        n = len(logprobs_NV)
        found_N = logprobs_NV.gather(1, self._labels_N[:n, None])[:, 0]
        self.off.append(found_N - self._stored_N[:n])
        self._labels_N, self._stored_N = self._labels_N[n:], self._stored_N[n:]


def _manifest(folder: Path) -> Manifest:
    found = read_manifest(folder)
    assert found is not None, folder
    return found


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
