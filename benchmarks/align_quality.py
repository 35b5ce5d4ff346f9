"""What a student gains from a teacher with another tokenizer, compared with cross-entropy on the same bytes of text.

python benchmarks/align_quality.py                      two small BPEs and a teacher made here, 5 seeds
python benchmarks/align_quality.py --pair gemma-smol    Gemma 3 270M teaches 6 layers of SmolLM2 135M, 3 seeds
python benchmarks/align_quality.py --pair smol-gemma    the reverse, with all of Gemma; real_models.py fetches both
python benchmarks/align_quality.py --smoke              the smallest size, to check that it works
python benchmarks/align_page.py                         the tables of docs/how-to/another-tokenizer.md

Every arm of a seed starts from the same weights and sees the same sequences of the student's tokens once, in the same
order. Bits per byte and KL of chunks are measured on the same held-out text. A finished training is a line of the
results, and is not repeated; a killed one continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

from align_page import ARMS, PAIRS, table
from machine import RESULTS, machine, mixed_precision
from real_models import GEMMA_3, SMOLLM2, documentation, real_model
from result_lines import Results

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.stage.device import resolve_device
from capgap.pipeline.store import keep_freed_memory
from capgap.pipeline.store.files import whole_folder
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.graph import instances
from capgap.schemas.facts import CacheFacts
from capgap.schemas.manifest import Manifest
from capgap.schemas.results import RESULTS_NAME, EvalResults
from capgap.schemas.run_file import RunFile

# teacher and student of each pair
REAL = {"gemma-smol": (GEMMA_3, SMOLLM2), "smol-gemma": (SMOLLM2, GEMMA_3)}
# Tokens that a real teacher scores. A student with Gemma's vocabulary takes four times as long for each token.
NUM_TOKENS = {"gemma-smol": 24_576, "smol-gemma": 8_192}
CACHE: dict[str, Any] = {"engine": "transformers", "recording": "topk"}
PROJECTED_TOP_K = 16
# the teacher's dtype for each precision of the trainings
_DTYPES = {"bf16-mixed": "bfloat16", "32-true": "float32"}
TRAIN: dict[str, Any] = {"validate_every_steps": 10_000, "num_validation_sequences": 1}


def main() -> None:
    """Run the trainings that the results lack, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", choices=list(PAIRS), default="bpe")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--work", type=Path, help="folder of the caches and trainings; default: runs/align-PAIR")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/align-quality-PAIR.jsonl")
    parser.add_argument("--smoke", action="store_true", help="run one seed at the smallest size as a check")
    flags = parser.parse_args()
    name = f"{flags.pair}{'-smoke' if flags.smoke else ''}"
    work = (flags.work or Path(f"runs/align-{name}")).resolve()
    results = Results(flags.results or (work if flags.smoke else RESULTS) / f"align-quality-{name}.jsonl")
    os.environ.setdefault("CAPGAP_LEASE_DIR", str(work / "leases"))
    keep_freed_memory()
    num_seeds, arms = PAIRS[flags.pair]
    bench = Bench(flags.pair, work, flags.smoke)
    for seed in range(flags.seeds or (1 if flags.smoke else num_seeds)):
        for arm in arms:
            if not results.has(arm, seed, bench.about):
                results.add(bench.measured(arm, seed))
                print(f"{time.strftime('%H:%M:%S')} {arm}, seed {seed}: {results.lines[-1]}", flush=True)
    print("\n".join(f"| {' | '.join(row)} |" for row in table(results.lines)))


@dataclass(frozen=True)
class Models:
    """Settings of one pair of teacher and student.

    Attributes:
        teacher: Sections of the run file that makes the cache.
        tokenizer: Folder of the student's tokenizer.
        student: Section `student` of the trainings' run files.
        train: Settings of `train` that all arms share.
        known_as: How the results name the student.
    """

    teacher: dict[str, Any]
    tokenizer: Path
    student: dict[str, Any]
    train: dict[str, Any]
    known_as: Any


class Bench:
    """The cache of a pair, which is made if it is missing, and the trainings from it.

    Args:
        pair: One of `PAIRS`.
        work: Folder of the cache and the trainings.
        smoke: Whether everything has the smallest size.
    """

    def __init__(self, pair: str, work: Path, smoke: bool) -> None:
        self._work = work
        self._models = _small(work, smoke) if pair == "bpe" else _real(pair, work, smoke)
        _carry_out({"out": str(work / "teacher"), **self._models.teacher})
        align = {"tokenizer": str(self._models.tokenizer), "projected_top_k": PROJECTED_TOP_K}
        self._aligned = work / "aligned" / "align"
        manifest = _carry_out(
            {"out": str(work / "aligned"), "reuse": {"cache": str(work / "teacher" / "cache")}, "align": align}
        )
        self._facts = CacheFacts.model_validate(manifest.facts)
        self._num_tokens = manifest.shard_sets["chunks"].num_tokens
        self.about: dict[str, Any] = {
            "pair": pair,
            "smoke": smoke,
            "cache": manifest.content[:12],
            "student": self._models.known_as,
            "train": self._models.train,
        }

    def measured(self, arm: str, seed: int) -> dict[str, Any]:
        """Train one arm and seed, and return its line of the results."""
        out = self._work / f"{arm}-seed-{seed}"
        is_whole = not out.exists()
        wall, cpu = time.perf_counter(), time.process_time()
        _carry_out(
            {
                "out": str(out),
                "seeds": [seed],
                "reuse": {"cache": str(self._aligned)},
                "student": self._models.student,
                "train": self._models.train,
                "arms": {arm: ARMS[arm]},
                "eval": {},
            }
        )
        wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        found = EvalResults.model_validate_json((out / "eval" / RESULTS_NAME).read_text())
        [model] = [one for one in found.models if one.arm == arm]
        assert found.cached is not None and model.against_cache is not None and self._facts.aligned is not None
        shutil.rmtree(out)  # the student is not needed any more
        aligned = self._facts.aligned
        return {
            "arm": arm,
            "seed": seed,
            "bits_per_byte": model.bits_per_byte,
            "chunk_kl": model.against_cache.chunk_kl,
            "teacher_bits_per_byte": found.cached.teacher_bits_per_byte,
            "num_text_bytes": self._facts.splits["student"].num_text_bytes,
            "num_tokens": self._num_tokens,
            "kept_chunks": round(aligned.num_kept_chunks / aligned.num_chunks, 4),
            "projected": round(aligned.num_projected / self._num_tokens, 4),
            # this process has only timed a part of a training that continued from a checkpoint
            "wall_s": round(wall_s, 1) if is_whole else None,
            "cpu_s": round(cpu_s, 1) if is_whole else None,
            "settings": ARMS[arm],
            "about": self.about,
            "machine": machine(resolve_device("auto")),
        }


def _small(work: Path, smoke: bool) -> Models:
    """Return a teacher of 2.2 million parameters and a student of 0.34 million, whose tokenizer is trained here."""
    tokenizer, seq_len = work / "tokenizer", 128
    if not tokenizer.is_dir():
        pages = [text for _, text in sorted(pydoc_data.topics.topics.items())]
        with whole_folder(tokenizer) as folder:
            train_tokenizer(pages, 1200).save_pretrained(folder)
    max_tokens = {"teacher": 1_500_000, "student": 400_000, "heldout": 60_000}
    teacher = {
        "corpus": {"sources": ["builtin:python"], "vocab_size": 2000, "teacher_fraction": 0.7}
        | _splits(seq_len, 16 if smoke else 64, max_tokens, smoke),
        "teacher": {
            "model": {"hidden_size": 192, "num_layers": 4, "num_heads": 6, "intermediate_size": 512},
            "training": {"batch_sequences": 16, "learning_rate": 3e-3},
        },
        "cache": CACHE | {"max_tokens": 120_000, "num_heldout_sequences": max_tokens["heldout"] // seq_len},
    }
    student = {"model": {"hidden_size": 96, "num_layers": 2, "num_heads": 3, "intermediate_size": 256}}
    return Models(teacher, tokenizer, student, TRAIN | {"batch_sequences": 8, "learning_rate": 3e-3}, student)


def _real(pair: str, work: Path, smoke: bool) -> Models:
    """Return two real models; as a student, SmolLM2 is pruned to 6 layers, and training has to restore its quality."""
    teacher, student = map(real_model, REAL[pair])
    seq_len, shard = (128, 4) if smoke else (512, 16)
    precision = mixed_precision(resolve_device("auto"))
    corpus = {"sources": [str(documentation())], "teacher_fraction": 0.0, "heldout_fraction": 0.1}
    max_tokens = {"student": NUM_TOKENS[pair], "heldout": 16 * seq_len}
    scored = {
        "corpus": corpus | {"tokenizer": str(teacher)} | _splits(seq_len, shard, max_tokens, smoke),
        "teacher": {"path": str(teacher)},
        "cache": CACHE | {"dtype": _DTYPES[precision], "num_heldout_sequences": max_tokens["heldout"] // seq_len},
    }
    train = TRAIN | {"batch_sequences": 1, "precision": precision}
    if pair == "smol-gemma":
        # Gemma cannot be pruned, so its student is the whole model, which needs a low learning rate
        return Models(scored, student, {"path": str(student)}, train | {"learning_rate": 5e-5}, student.name)
    # pruning scores the layers on a part of the same text
    cut = _carry_out(
        {
            "out": str(work / "pruned"),
            "corpus": corpus
            | {"tokenizer": str(student)}
            | _splits(seq_len, shard, {"student": 16 * seq_len, "heldout": 8 * seq_len}, smoke),
            "teacher": {"path": str(student)},
            "student": {"prune": {"num_layers": 6, "num_sequences": 16}},
        }
    )
    path = work / "pruned" / "student" / "seed-0" / "model"
    return Models(scored, student, {"path": str(path)}, train | {"learning_rate": 1e-3}, cut.content[:12])


def _splits(seq_len: int, shard: int, max_tokens: dict[str, int], smoke: bool) -> dict[str, Any]:
    """Return the sizes of a corpus: `max_tokens` of each split, or one shard of each for a smoke test."""
    sizes = {name: seq_len * shard if smoke else number for name, number in max_tokens.items()}
    return {"seq_len": seq_len, "shard_sequences": shard, "max_tokens": sizes}


def _carry_out(sections: dict[str, Any]) -> Manifest:
    """Make every stage of a run except its report, and return the last stage's manifest."""
    run = RunFile.model_validate({"name": "align-quality", **sections})
    made = [carry_out(run, instance) for instance in instances(run) if instance.stage != "report"]
    return made[-1]


if __name__ == "__main__":
    main()
