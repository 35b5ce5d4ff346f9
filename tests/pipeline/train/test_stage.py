"""Corpus to trained student through the stages themselves; teacher and engine are as small as they come."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.train import stage
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.context import Instance, StageContext, StageInput
from capgap.pipeline.workflow.state import State, read_manifest, states
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.run_file import RunFile

SEQ_LEN = 32
TRAIN = Instance("train", "distilled", 1)
NEEDED = (Instance("corpus"), Instance("teacher"), Instance("cache"), Instance("student", seed=1))


def _settings(folder: Path, salt: str) -> dict[str, Any]:
    folder.mkdir()
    texts = [f"{salt} {i} is {i * i} and then {' '.join(str(i * k) for k in range(30))}\n" for i in range(60)]
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_text(text)
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=SEQ_LEN,
        initializer_range=0.3,  # sharp: there is something to learn
    )
    LlamaForCausalLM(config).save_pretrained(folder / "given")
    train_tokenizer(texts, 300).save_pretrained(folder / "given")
    return {
        "name": "tiny",
        "out": str(folder / "out"),
        "device": "cpu",
        "seeds": [1],
        "corpus": {
            "sources": [str(folder / "*.txt")],
            "tokenizer": str(folder / "given"),
            "seq_len": SEQ_LEN,
            "teacher_fraction": 0.0,
            "heldout_fraction": 0.2,
        },
        "teacher": {"path": str(folder / "given")},
        "cache": {"engine": "transformers", "num_draws": 20},
        "student": {"model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}},
        "train": {"batch_sequences": 4, "log_every_steps": 2, "max_tokens": 30 * 4 * SEQ_LEN},
        "arms": {"distilled": {}, "cross_entropy": {"alpha": 0.0, "max_tokens": 2 * 4 * SEQ_LEN}},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Two runs whose texts, and so corpora and tokenizers, differ; all that training needs is made."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {salt: _settings(folder / salt, salt) for salt in ("number", "square")}
    for run in runs.values():
        for instance in NEEDED:
            carry_out(RunFile.model_validate(run), instance)
    return runs


def test_a_student_is_trained_and_its_folder_can_be_used(made) -> None:
    run = RunFile.model_validate(made["number"])
    manifest = carry_out(run, TRAIN)
    folder = Path(run.out) / TRAIN.name
    assert manifest.totals["num_steps"] == 30
    assert manifest.facts["tokenizer"] == carry_out(run, NEEDED[0]).facts["tokenizer"]
    assert not (folder / "work").exists(), "checkpoints have served"
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train_kl"]]
    assert [int(row["step"]) for row in rows] == [*range(2, 31, 2)]
    assert float(rows[-1]["train_kl"]) < float(rows[0]["train_kl"]) - 0.05
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer("number 3 is 9", return_tensors="pt").input_ids
    assert math.isfinite(float(model(input_ids=ids, labels=ids).loss.detach()))
    start = AutoModelForCausalLM.from_pretrained(Path(run.out) / NEEDED[3].name / "model")
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)


def test_an_arm_has_its_own_settings(made) -> None:
    manifest = carry_out(RunFile.model_validate(made["number"]), Instance("train", "cross_entropy", 1))
    assert manifest.totals["num_steps"] == 2


def test_a_cache_of_another_corpus_is_refused(made) -> None:
    cache = f"{made['square']['out']}/cache"
    run = RunFile.model_validate(made["number"] | {"reuse": {"cache": cache}})
    with pytest.raises(MismatchError, match=f"{cache}: the cache was made from another corpus; found corpus"):
        carry_out(run, TRAIN, force=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"divergence": "jsd"},
            "a sampled cache with train.divergence jsd, train.tail drop, expected forward_kl; freq",
        ),
        ({"tail": "ghost"}, ".* forward_kl, train.tail ghost, expected drop or renorm; drawn targets"),
    ],
)
def test_a_divergence_that_the_recording_cannot_give_is_refused(made, settings: dict, message: str) -> None:
    given = made["number"]
    run = RunFile.model_validate(given | {"train": given["train"] | settings})
    with pytest.raises(MismatchError, match=f"cache: the cache does not support this divergence; found {message}"):
        carry_out(run, TRAIN, force=True)


def test_an_arm_without_divergence_needs_no_support_for_it(made) -> None:
    given = made["number"]
    run = RunFile.model_validate(given | {"train": given["train"] | {"divergence": "reverse_kl"}})
    assert carry_out(run, Instance("train", "cross_entropy", 1), force=True).totals["num_steps"] == 2


def test_a_cache_in_s3_trains_the_same_student(made, s3_server, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CAPGAP_DOWNLOADS", str(tmp_path / "downloads"))
    local = made["number"]
    folder = Path(local["out"]) / "cache"
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir("caches")
    filesystem.put(str(folder), "caches/number", recursive=True)
    here = carry_out(RunFile.model_validate(local), TRAIN, force=True)
    reuse = {stage: f"{local['out']}/{stage}" for stage in ("corpus", "teacher")} | {"cache": "s3://caches/number"}
    run = RunFile.model_validate(local | {"out": str(tmp_path / "out"), "reuse": reuse})
    carry_out(run, NEEDED[3])
    there = carry_out(run, TRAIN)
    assert there.inputs["cache"].path == "s3://caches/number"
    weights = [{file.path: file.sha256 for file in manifest.files} for manifest in (here, there)]
    assert weights[0]["model/model.safetensors"] == weights[1]["model/model.safetensors"]
    assert states(run)[TRAIN.name].state is State.CURRENT


def test_a_corpus_is_not_read_from_a_url(made, s3_server, tmp_path) -> None:
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir("caches")
    filesystem.put(f"{made['number']['out']}/corpus/manifest.json", "caches/corpus/manifest.json")
    given = made["number"] | {"out": str(tmp_path / "out"), "reuse": {"corpus": "s3://caches/corpus"}}
    with pytest.raises(InputError, match=r"reuse.corpus: must lie on a local disk; found s3://caches/corpus"):
        carry_out(RunFile.model_validate(given), NEEDED[3])


def test_a_url_without_a_manifest_is_refused(made, s3_server) -> None:
    fsspec.filesystem("s3").mkdir("caches")
    run = RunFile.model_validate(made["number"] | {"reuse": {"cache": "s3://caches/none"}})
    with pytest.raises(InputError, match=r"reuse.cache: s3://caches/none: cannot be reused; found no manifest.json"):
        states(run)


def test_a_student_of_another_tokenizer_is_refused(made, tmp_path) -> None:
    run = RunFile.model_validate(made["number"])
    inputs = {instance.name: _input(run, instance) for instance in NEEDED}
    context = StageContext(run, TRAIN, tmp_path, inputs, "cpu")
    other = _input(RunFile.model_validate(made["square"]), NEEDED[3])
    with pytest.raises(MismatchError, match=f"{other.path}: cache and student have different tokenizers"):
        stage.run(dataclasses.replace(context, inputs=inputs | {NEEDED[3].name: other}))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)]
)
def test_a_bfloat16_student_is_trained_in_the_precision_of_the_run_file(made, tmp_path, precision, dtype) -> None:
    given = tmp_path / "given"
    run = RunFile.model_validate(made["number"])
    source = Path(run.out) / NEEDED[3].name / "model"
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(given)
    AutoTokenizer.from_pretrained(source).save_pretrained(given)
    reuse = {stage: f"{run.out}/{stage}" for stage in ("teacher", "cache")}
    run = RunFile.model_validate(
        made["number"]
        | {"out": str(tmp_path / "out"), "reuse": reuse | {"corpus": f"{run.out}/corpus"}}
        | {"student": {"path": str(given)}, "train": made["number"]["train"] | {"precision": precision}}
        | {"arms": {"distilled": {"max_tokens": 2 * 4 * SEQ_LEN}}}
    )
    carry_out(run, NEEDED[3])
    carry_out(run, TRAIN)
    trained = AutoModelForCausalLM.from_pretrained(Path(run.out) / TRAIN.name / "model", dtype="auto")
    assert trained.dtype == dtype


def _input(run: RunFile, instance: Instance) -> StageInput:
    folder = Path(run.out) / instance.name
    manifest = read_manifest(folder)
    assert manifest is not None
    return StageInput(folder, manifest)
