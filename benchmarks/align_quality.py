"""What a teacher of another tokenizer gives a student, beside cross-entropy alone on the same bytes of text.

python benchmarks/align_quality.py                      two small BPEs and a teacher made here, 5 seeds
python benchmarks/align_quality.py --pair gemma-smol    Gemma 3 270M teaches SmolLM2 135M, 3 seeds; needs real_models.py
python benchmarks/align_quality.py --pair smol-gemma    the reverse
python benchmarks/align_quality.py --smoke              the smallest size, to see that it works

Every arm of a seed starts from the same weights and sees the same sequences of the student's tokens in the same order.
Bits per byte and KL of chunks are of the same held-out text. A finished training is a line of the results, and is not
done again; one that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

# found beside this file also where Python is told not to look there: -P, PYTHONSAFEPATH
sys.path.insert(0, str(Path(__file__).parent))

from machine import RESULTS, machine

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.stage.device import resolve_device
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.graph import instances
from capgap.schemas.results import RESULTS_NAME, EvalResults
from capgap.schemas.run_file import RunFile

ROOT = Path(__file__).parents[1]
MODELS = Path(os.environ.get("CAPGAP_REAL_MODELS", ROOT / "runs" / "real-models"))
GEMMA, SMOL = str(MODELS / "gemma-3-270m"), str(MODELS / "SmolLM2-135M-Instruct")
ARMS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"alpha": 0.0},
    "chunks": {"alpha": 0.5, "temperature": 1.0},
    "chunks-100": {"alpha": 0.5, "temperature": 100.0},
    "chunks-alone": {"alpha": 1.0, "temperature": 100.0},
    "chunks-reverse": {"alpha": 0.5, "temperature": 1.0, "divergence": "reverse_kl"},
    "projected": {"alpha": 0.5, "temperature": 100.0, "projected_weight": 0.5},
}
FEW = ["cross_entropy", "chunks-100", "projected"]
PAIRS = {"bpe": (5, list(ARMS)), "gemma-smol": (3, FEW), "smol-gemma": (3, FEW)}


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", choices=list(PAIRS), default="bpe")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--work", type=Path, help="caches, and trainings at work; default: runs/align-PAIR")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/align-quality-PAIR.jsonl")
    parser.add_argument("--smoke", action="store_true", help="one seed at the smallest size, to see that it works")
    flags = parser.parse_args()
    name = f"{flags.pair}{'-smoke' if flags.smoke else ''}"
    work = (flags.work or Path(f"runs/align-{name}")).resolve()
    results = flags.results or (work if flags.smoke else RESULTS) / f"align-quality-{name}.jsonl"
    os.environ.setdefault("CAPGAP_LEASE_DIR", str(work / "leases"))
    num_seeds, arms = PAIRS[flags.pair]
    teacher, student = _runs(flags.pair, work, flags.smoke)
    for seed in range(flags.seeds or (1 if flags.smoke else num_seeds)):
        out = work / f"seed-{seed}"
        run = RunFile.model_validate(
            {**student, "arms": {arm: ARMS[arm] for arm in arms}, "seeds": [seed], "out": str(out)}
        )
        about = {"pair": flags.pair, "smoke": flags.smoke, "seed": seed}
        kept = {one["arm"] for one in _lines(results) if one["about"] == about}
        if not kept.issuperset(arms):
            _carry_out(RunFile.model_validate(teacher))
            _carry_out(run)
            _keep(results, about, kept, run)
    print(_table(_lines(results)))


def _runs(pair: str, work: Path, smoke: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run that makes the cache, and that of the students."""
    train: dict[str, Any] = {"validate_every_steps": 10_000}
    cache: dict[str, Any] = {"engine": "transformers", "recording": "topk"}
    if pair == "bpe":
        tokens = {"teacher": 1_500_000, "student": 400_000, "heldout": 60_000}
        tokenizer, seq_len = work / "tokenizer", 128
        cache["max_tokens"] = 120_000
        train |= {"batch_sequences": 8, "learning_rate": 3e-3}
        corpus: dict[str, Any] = {"sources": ["builtin:python"], "vocab_size": 2000, "teacher_fraction": 0.7}
        teacher: dict[str, Any] = {
            "model": {"hidden_size": 192, "num_layers": 4, "num_heads": 6, "intermediate_size": 512},
            "training": {"batch_sequences": 16, "learning_rate": 3e-3},
        }
        student: dict[str, Any] = {
            "model": {"hidden_size": 96, "num_layers": 2, "num_heads": 3, "intermediate_size": 256}
        }
        if not tokenizer.is_dir():
            pages = [path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))]
            train_tokenizer(pages, 1200).save_pretrained(tokenizer)
    else:
        tokens = {"student": 100_000, "heldout": 16_000}
        path, seq_len = (GEMMA, 512) if pair == "gemma-smol" else (SMOL, 512)
        tokenizer = Path(SMOL if pair == "gemma-smol" else GEMMA)
        corpus = {"sources": [str(MODELS / "django-documentation")], "tokenizer": path, "teacher_fraction": 0.0}
        teacher, student = {"path": path}, {"path": str(tokenizer)}
        train |= {"batch_sequences": 4, "learning_rate": 2e-5, "precision": "bf16-mixed"}
    shards = 16 if smoke else 64
    # a shard of each split at least
    corpus |= {"seq_len": seq_len, "shard_sequences": shards, "heldout_fraction": 0.1}
    corpus["max_tokens"] = {name: seq_len * shards if smoke else number for name, number in tokens.items()}
    made = {
        "name": f"align-{pair}",
        "out": str(work / "teacher"),
        "corpus": corpus,
        "teacher": teacher,
        "cache": cache | {"num_heldout_sequences": tokens["heldout"] // seq_len},
    }
    learning = {
        "name": f"align-{pair}",
        "reuse": {"cache": str(work / "teacher" / "cache")},
        "align": {"tokenizer": str(tokenizer), "projected_top_k": 16},
        "student": student,
        "train": train,
        "eval": {},
    }
    return made, learning


def _carry_out(run: RunFile) -> None:
    for instance in instances(run):
        carry_out(run, instance)


def _keep(results: Path, about: dict[str, Any], kept: set[str], run: RunFile) -> None:
    """A line for each arm that has none."""
    found = EvalResults.model_validate_json((Path(run.out) / "eval" / RESULTS_NAME).read_text())
    bits = None if found.cached is None else found.cached.teacher_bits_per_byte
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        for model in found.models:
            if model.arm is None or model.arm in kept:
                continue
            near = model.against_cache
            line = {"arm": model.arm, "bits_per_byte": model.bits_per_byte, "chunk_kl": near and near.chunk_kl}
            line |= {"teacher_bits_per_byte": bits, "about": about, "settings": run.arms[model.arm]}
            file.write(json.dumps(line | {"machine": machine(resolve_device(run.device))}) + "\n")


def _lines(results: Path) -> list[dict[str, Any]]:
    """What is kept; a killed process may have left half a line at the end."""
    whole = results.read_text().rpartition("\n")[0] if results.is_file() else ""
    return [json.loads(line) for line in whole.splitlines()]


def _table(lines: list[dict[str, Any]]) -> str:
    """Means over seeds, and what is gained beside cross-entropy of the same seed."""
    by_seed = {(one["arm"], one["about"]["seed"]): one for one in lines}
    rows = ["arm | bits/byte | gain on cross-entropy, each seed | chunk KL", "---|---|---|---"]
    for arm in ARMS:
        own = {seed: one for (name, seed), one in by_seed.items() if name == arm}
        if not own:
            continue
        gains = [by_seed["cross_entropy", seed]["bits_per_byte"] - one["bits_per_byte"] for seed, one in own.items()]
        bits, apart = (statistics.fmean(one[name] for one in own.values()) for name in ("bits_per_byte", "chunk_kl"))
        rows.append(f"{arm} | {bits:.4f} | {', '.join(f'{gain:+.4f}' for gain in gains)} | {apart:.4f}")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
