"""What the train stage reads: caches and students of other runs, precisions, URLs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from tiny_runs import NEEDED, SEQ_LEN, TRAIN
from transformers import AutoModelForCausalLM, AutoTokenizer

from capgap.pipeline.stage.context import Instance, StageContext, StageInput
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.train import stage
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.run_file import RunFile


def test_a_cache_of_another_corpus_is_refused(made) -> None:
    cache = f"{made['square']['out']}/cache"
    run = RunFile.model_validate(made["number"] | {"reuse": {"cache": cache}})
    with pytest.raises(MismatchError, match=f"{cache}: the cache was made from another corpus; found corpus"):
        carry_out(run, TRAIN, remake=True)


def _reusing(given: dict[str, Any]) -> dict[str, Any]:
    """The same run with its own cache reused: what a cache has is known from its manifest alone."""
    reused = {"reuse": {"cache": str(Path(given["out"]) / "cache")}}
    return {name: value for name, value in given.items() if name != "cache"} | reused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"divergence": "jsd"},
            "sampled targets with train.divergence jsd, train.tail drop, expected forward_kl; freq",
        ),
        ({"tail": "ghost"}, ".* forward_kl, train.tail ghost, expected drop or renorm; samples have"),
    ],
)
def test_a_divergence_that_the_recording_cannot_give_is_refused(made, settings: dict, message: str) -> None:
    run = RunFile.model_validate(_reusing(made["number"]) | {"train": made["number"]["train"] | settings})
    with pytest.raises(MismatchError, match=f"cache: the cache does not support this divergence; found {message}"):
        carry_out(run, TRAIN, remake=True)


def test_an_arm_without_divergence_needs_no_support_for_it(made) -> None:
    run = RunFile.model_validate(
        _reusing(made["number"]) | {"train": made["number"]["train"] | {"divergence": "reverse_kl"}}
    )
    assert carry_out(run, Instance("train", "cross_entropy", 1), remake=True).totals["num_steps"] == 2


def test_a_cache_in_s3_trains_the_same_student(made, s3_server, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CAPGAP_DOWNLOADS", str(tmp_path / "downloads"))
    local = made["number"]
    folder = Path(local["out"]) / "cache"
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir("caches")
    filesystem.put(str(folder), "caches/number", recursive=True)
    here = carry_out(RunFile.model_validate(local), TRAIN, remake=True)
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
