"""Finished folders of a run, written with made-up but consistent numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capgap.pipeline.eval.arms import differences_over_seeds, paired_differences
from capgap.pipeline.eval.intervals import bootstrap_interval, resample_weights
from capgap.pipeline.stage.context import Instance, StageContext, StageInput
from capgap.schemas.facts import CacheFacts, RecordingFacts, SplitFacts, TokenizerFacts
from capgap.schemas.manifest import FileEntry, Manifest, Members, ShardEntry, ShardSet
from capgap.schemas.results import RESULTS_NAME, AgainstTeacher, EvalResults, ModelResult, Sample
from capgap.schemas.run_file import RunFile

TOKENIZER = TokenizerFacts(fingerprint="f" * 64, vocab_size=4096, eos_id=0)
NUM_SEQUENCES, SEQ_LEN = 512, 256
_BY_LENGTH = (0, 0, 0, 0, 2, 0, *range(7, 18))  # up to 65,536 tokens
_STUDENT_TEXT = SplitFacts(num_documents=9, num_text_bytes=1000, num_text_tokens=300, by_length=_BY_LENGTH)


@pytest.fixture(scope="session")
def make_context() -> Callable[..., StageContext]:
    """A report stage's context.

    `losses` holds the mean loss of every student, by arm and seed. An arm named `cross_entropy` has alpha 0.
    `recordings` holds the number of ids of each recording of the cache.
    """

    def make(folder: Path, losses: dict[str, list[float]], **run_settings: Any) -> StageContext:
        recordings = run_settings.pop("recordings", {"sampled": 50})
        seeds = list(range(len(next(iter(losses.values())))))
        arms = {arm: {"alpha": 0} if arm.startswith("cross_entropy") else {} for arm in losses}
        run = RunFile.model_validate(
            {
                "name": "tiny-run",
                "out": str(folder),
                "seeds": seeds,
                "corpus": {},
                "teacher": {"model": {}},
                "cache": {},
                "student": {"model": {}},
                "arms": arms,
                "eval": {},
                **run_settings,
            }
        )
        names = [f"train/{arm}/seed-{seed}" for arm in losses for seed in seeds]
        students = [f"student/seed-{seed}" for seed in seeds]
        inputs = {}
        for name in ("corpus", "teacher", "cache", *students, *names, "eval"):
            (folder / name).mkdir(parents=True)
            inputs[name] = StageInput(folder / name, _manifest(name, recordings))
        _write_curves(inputs, losses)
        (folder / "eval" / RESULTS_NAME).write_text(_results(losses).model_dump_json())
        (folder / "report").mkdir()
        return StageContext(run, Instance("report"), folder / "report", inputs, "cpu")

    return make


def _manifest(name: str, recordings: dict[str, int]) -> Manifest:
    stage = name.split("/")[0]
    extra: dict[str, Any] = {"versions": {"python": "3.11.2", "torch": "2.13.0"}}
    if stage == "cache":
        facts = CacheFacts(
            tokenizer=TOKENIZER,
            context="packed",
            splits={"student": _STUDENT_TEXT},
            text_sources=("somewhere",),
            whole_conversations=False,
            temperature=1.0,
            recordings={
                name: RecordingFacts(
                    num_ids=num_ids,
                    profile="small" if name == "topk" else None,
                    temperatures=(1.0,) if name == "sampled" else (1.0, 2.5),
                )
                for name, num_ids in recordings.items()
            },
            padded_vocab_size=4224,
            num_teacher_parameters=7_610_000,
            engines=("<b>vllm</b> 0.30.1",),
            dtypes=("float32",),
            mean_label_loss=2.9,
        )
        extra["facts"] = facts.model_dump(mode="json")
        extra["shard_sets"] = {name: _shards(name, 4096, 64_000_000 * (1 + n)) for n, name in enumerate(recordings)}
        extra["versions"] |= {"vllm": "<script>alert(1)</script>"}
    if stage in ("teacher", "train"):
        extra["totals"] = {"num_tokens": 8_000_000 if stage == "teacher" else 2_000_000}
    if stage == "train":
        weights = FileEntry(path="model/model.safetensors", num_bytes=700_000, sha256="0" * 64)
        extra["files"] = (weights, FileEntry(path="high_precision/model.safetensors", num_bytes=9, sha256="0" * 64))
    if stage == "corpus":
        extra["shard_sets"] = {"heldout": _shards("heldout", NUM_SEQUENCES, 300_000)}
    empty = {"settings": {}, "inputs": {}, "files": (), "command": (), "started": "2026-01-01T00:00:00Z"}
    digest = f"{sum(name.encode()):04x}" * 16
    return Manifest(stage=stage, instance=name, identity=digest, content=digest, wall_s=75.0, **empty | extra)


def _shards(name: str, num_sequences: int, num_bytes: int) -> ShardSet:
    entry = ShardEntry(
        file=FileEntry(path=f"{name}-000000.tar", num_bytes=num_bytes, sha256="0" * 64),
        num_sequences=num_sequences,
        members=Members(),
    )
    return ShardSet(codec="sequences-planes-1", codec_settings={}, seq_len=SEQ_LEN, shards=(entry,))


def _write_curves(inputs: dict[str, StageInput], losses: dict[str, list[float]]) -> None:
    ends = {f"train/{arm}/seed-{seed}": loss for arm, found in losses.items() for seed, loss in enumerate(found)}
    for name, loss in {"teacher": 2.9, **ends}.items():
        lines = ["step,num_tokens,train_loss,validation_loss,tokens_per_s,gradient_norm,heldout_teacher_ce"]
        for step in range(100, 2001, 100):
            lines.append(f"{step},{2048 * step},{loss + 0.1},,{step + 450},1.5,")
            lines.append(f"{step},{2048 * step},,{loss + 3 * math.exp(-step / 400):.6f},,,{loss + 1}")
        (inputs[name].path / "metrics.csv").write_text("\n".join(lines) + "\n")


def _results(losses: dict[str, list[float]]) -> EvalResults:
    rng = np.random.default_rng(3)
    labels_S = np.full(NUM_SEQUENCES, SEQ_LEN)
    weights_RS = resample_weights(NUM_SEQUENCES, 200)
    text_S = rng.normal(0, 0.4, NUM_SEQUENCES)  # how hard a sequence is for every model

    def nats(loss: float) -> Any:
        own_S = rng.normal(0, 0.05, NUM_SEQUENCES)
        return (loss + text_S - text_S.mean() + own_S - own_S.mean()) * labels_S

    def row(name: str, arm: str | None, seed: int | None, nats_S: Any) -> ModelResult:
        loss = float(nats_S.sum() / labels_S.sum())
        near = AgainstTeacher(kl=loss - 2.8, top1=0.61, top5=0.7, acceptance=0.72)
        return ModelResult(
            name=name,
            arm=arm,
            seed=seed,
            num_parameters=1_240_000 if arm else 7_610_000,
            num_non_embedding_parameters=1_000_000,
            loss=loss,
            loss_interval=bootstrap_interval(nats_S, labels_S, weights_RS),
            bits_per_byte=loss * 0.3 / math.log(2),
            perplexity=math.exp(loss),
            against_teacher=near if arm else None,
        )

    nats_of = {arm: {seed: nats(loss) for seed, loss in enumerate(found)} for arm, found in losses.items()}
    paired = paired_differences(nats_of, labels_S, weights_RS)
    return EvalResults(
        num_sequences=NUM_SEQUENCES,
        num_labels=NUM_SEQUENCES * SEQ_LEN,
        num_full_sequences=64,
        num_full_labels=64 * SEQ_LEN,
        num_bootstrap=200,
        models=(
            row("teacher", None, None, nats(2.9)),
            *(
                row(f"train/{arm}/seed-{seed}", arm, seed, nats_S)
                for arm, found in nats_of.items()
                for seed, nats_S in found.items()
            ),
        ),
        paired=paired,
        over_seeds=differences_over_seeds(paired),
        samples=tuple(_sample(i, nats_of) for i in range(2)),
    )


def _sample(i: int, arms: dict[str, dict[int, Any]]) -> Sample:
    students = [f"train/{arm}/seed-{seed}" for arm, seeds in arms.items() for seed in seeds]
    written = {name: f"  return {name} <{i}>" for name in ("teacher", *students)}
    return Sample(prompt=f"def number_{i}():\n", truth=f"  return {i}", continuations=written)
