"""What a student gains from starting as its pruned teacher, at equal tokens, for several scores and shapes.

python benchmarks/pruning.py              every training that is missing, then the table; kept in results/
python benchmarks/pruning.py --smoke      the same at the smallest size, to check that it works

There is one teacher, one cache, and one pass over the same tokens for every student. The seed decides the order of the
data, fresh weights and random scores. `width` and `depth` have the same number of parameters outside the embedding, to
within 1 %, and `fresh` has the shape of `width`. Every start is trained at each learning rate, and compared at its best
one. Everything is made by stages of ordinary run files, so finished stages are not made again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

from machine import RESULTS, keep

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.graph import instances
from capgap.schemas.results import RESULTS_NAME, EvalResults
from capgap.schemas.run_file import RunFile

WIDTH = {"hidden_size": 96, "num_heads": 3, "num_key_value_heads": 3, "intermediate_size": 220}
DEPTH = {"num_layers": 2}
STARTS: dict[str, dict[str, Any]] = {
    "fresh": {"model": {**WIDTH, "num_layers": 4}},
    "width, activation": {"prune": WIDTH},
    "width, taylor": {"prune": WIDTH | {"importance": "taylor"}},
    "width, random": {"prune": WIDTH | {"importance": "random"}},
    "depth, block influence": {"prune": DEPTH},
    "depth, loss": {"prune": DEPTH | {"layers": "loss"}},
    "depth, first and last": {"prune": DEPTH | {"layers": "first_and_last"}},
}
# Pairs of starts: the one that is expected to be better, and the one that it is compared with.
CLAIMS = (
    ("width, activation", "fresh"),
    ("width, activation", "width, random"),
    ("width, taylor", "width, random"),
    ("width, activation", "depth, block influence"),
    ("depth, block influence", "depth, first and last"),
)


def main() -> None:
    """Make what is missing, print the table, and write the figures to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-tokens", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=131_072, help="tokens that every student sees")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--work", type=Path, default=Path("runs/pruning"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="run at the smallest size, to check that everything works")
    flags = parser.parse_args()
    if flags.smoke:
        flags.seeds, flags.teacher_tokens, flags.tokens, flags.learning_rates = 1, 8192, 4096, [1e-3]
    os.environ.setdefault("CAPGAP_LEASE_DIR", str((flags.work / "leases").resolve()))
    rows = [row for name in STARTS for row in _rows(name, flags)]
    best = {name: _best(name, rows) for name in STARTS}
    print(_table(best))
    claims = [_claim(one, other, best) for one, other in CLAIMS]
    for claim in claims:
        print(claim["words"])
    about = {name: getattr(flags, name) for name in ("seeds", "teacher_tokens", "tokens", "learning_rates")}
    name = "pruning-smoke" if flags.smoke else "pruning"
    print(f"kept in {keep(name, 'cpu', {'about': about, 'rows': rows, 'claims': claims}, flags.results)}")


def _rows(name: str, flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each training of a start, with the figures from before and after the training."""
    run = _run(name, flags)
    totals: dict[int, dict[str, Any]] = {}
    for instance in instances(run):
        if instance.stage == "report":
            continue
        manifest = carry_out(run, instance)
        if instance.stage == "student":
            assert instance.seed is not None
            totals[instance.seed] = manifest.totals
    results = EvalResults.model_validate_json((Path(run.out) / "eval" / RESULTS_NAME).read_text())
    for model in results.models[1:]:
        assert model.seed is not None and model.against_teacher is not None and model.arm is not None
        yield {
            "start": name,
            "seed": model.seed,
            "learning_rate": run.train_settings(model.arm).learning_rate,
            "num_parameters": model.num_parameters,
            "num_non_embedding_parameters": model.num_non_embedding_parameters,
            "loss_before": totals[model.seed].get("heldout_loss_of_student"),
            "kl_before": totals[model.seed].get("kl_of_student"),
            "loss": model.loss,
            "kl": model.against_teacher.kl,
            "teacher_loss": results.teacher.loss,
        }


def _run(name: str, flags: argparse.Namespace) -> RunFile:
    """Return the run file of a start; all starts share corpus, teacher and cache, which are made first."""
    shared = flags.work / "shared"
    settings: dict[str, Any] = {
        "name": "pruning",
        "out": str(shared),
        "seeds": list(range(flags.seeds)),
        "device": "cpu",
        "corpus": {"vocab_size": 1024, "seq_len": 128, "teacher_fraction": 0.6, "heldout_fraction": 0.06},
        "teacher": {
            "model": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "intermediate_size": 352},
            "training": {"batch_sequences": 8, "max_tokens": flags.teacher_tokens},
        },
        "cache": {"engine": "transformers", "max_tokens": flags.tokens},
        "student": STARTS[name],
        "train": {"batch_sequences": 8, "max_tokens": flags.tokens, "loggers": []},
        "arms": {f"rate-{rate:g}": {"learning_rate": rate} for rate in flags.learning_rates},
        "eval": {"num_sequences": 256},
    }
    run = RunFile.model_validate(settings)
    for stage in ("corpus", "teacher", "cache"):
        carry_out(run, Instance(stage))
    reuse = {stage: str(shared / stage) for stage in ("corpus", "teacher", "cache")}
    folder = str(flags.work / name.replace(", ", "-").replace(" ", "-"))
    return RunFile.model_validate(settings | {"out": folder, "reuse": reuse})


def _best(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a start's trainings, by seed, at the learning rate with its lowest mean loss."""
    mine = [row for row in rows if row["start"] == name]
    by_rate = [[row for row in mine if row["learning_rate"] == rate] for rate in {row["learning_rate"] for row in mine}]
    return min(by_rate, key=lambda its: statistics.fmean(row["loss"] for row in its))


def _claim(one: str, other: str, best: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return how much higher the second start's loss is than the first's, seed by seed."""
    gains = [b["loss"] - a["loss"] for a, b in zip(best[one], best[other], strict=True)]
    words = f"{one} against {other}: {statistics.fmean(gains):+.4f} nats, by seed {[round(gain, 4) for gain in gains]}"
    return {"first": one, "second": other, "gains": gains, "words": words}


def _table(best: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| start | parameters beside the embedding | rate | KL before | loss | KL |", "|---|---|---|---|---|---|"]
    for name, rows in best.items():
        before = [row["kl_before"] for row in rows if row["kl_before"] is not None]
        cells = (
            name,
            f"{rows[0]['num_non_embedding_parameters']:,}",
            f"{rows[0]['learning_rate']:g}",
            _mean(before) if before else "-",
            _mean([row["loss"] for row in rows]),
            _mean([row["kl"] for row in rows]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    teacher = next(iter(best.values()))[0]["teacher_loss"]
    return "\n".join([*lines, f"the teacher's loss: {teacher:.4f}"])


def _mean(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.fmean(values):.4f} +- {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    main()
