"""Corpus to trained student through the stages themselves; teacher and engine are as small as they come."""

from __future__ import annotations

import csv
import itertools
import logging
import math
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_chats import save_chat_model
from tiny_runs import NEEDED, SEQ_LEN, TRAIN, train
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.train.metrics import read_rows
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import MachineError, MismatchError, SettingError
from capgap.schemas.run_file import RunFile


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
    before, *_, after = [row for row in read_rows(folder / "metrics.csv") if row["heldout_teacher_ce"]]
    assert (before["step"], after["step"]) == ("0", "30"), "how far it was before it had learnt anything"
    assert float(before["heldout_teacher_ce"]) > float(after["heldout_teacher_ce"]) + 0.05
    for name in ("validation_loss", "heldout_teacher_ce", "heldout_top1"):
        assert manifest.totals[f"first_{name}"] == float(before[name])
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer("number 3 is 9", return_tensors="pt").input_ids
    assert math.isfinite(float(model(input_ids=ids, labels=ids).loss.detach()))
    start = AutoModelForCausalLM.from_pretrained(Path(run.out) / NEEDED[3].name / "model")
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)


def test_the_folder_says_what_the_student_is_and_was_made_of(made) -> None:
    run = RunFile.model_validate(made["number"])
    manifest = carry_out(run, TRAIN)
    folder = Path(run.out) / TRAIN.name
    card = ModelCard.load(folder / "model" / "README.md")
    assert card.data.library_name == "transformers" and "knowledge-distillation" in card.data.tags
    assert card.data.base_model is None, "folders of this machine are no base models"
    measured = [row for row in read_rows(folder / "metrics.csv") if row["validation_loss"]][-1]
    figures = {"validation_loss", "heldout_teacher_ce", "heldout_top1"}
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {name: float(measured[name]) for name in figures}
    for text in (
        f"| teacher | {run.teacher.path}, scored by transformers ",
        f"| corpus | {run.corpus.sources[0]}, 3,840 tokens trained on (",
        "| recording | sampled: 20 samples a token, at temperature 1, context packed |",
        "| loss | 1 x 1^2 x forward_kl |",
        "| student before | fresh weights |",
        f"| made by | capgap {version('capgap')} |",
        *(f"| `{made.identity}` | `{made.content}` |" for made in manifest.inputs.values()),
    ):
        assert text in card.text, text
    assert "model/README.md" in {file.path for file in manifest.files}
    assert not any(file.path.startswith("logs/") for file in manifest.files), "their reader may throw them away"
    assert EventAccumulator(str(folder / "logs" / "tensorboard")).Reload().Scalars("heldout_top1")[-1].step == 30
    generation = GenerationConfig.from_pretrained(folder / "model")
    assert generation.eos_token_id == AutoTokenizer.from_pretrained(folder / "model").eos_token_id


def test_a_card_of_cross_entropy_alone_names_no_recording(made) -> None:
    run = RunFile.model_validate(made["number"])
    carry_out(run, Instance("train", "cross_entropy", 1))
    text = (Path(run.out) / "train" / "cross_entropy" / "seed-1" / "model" / "README.md").read_text()
    assert "| recording | none: cross-entropy alone |" in text and "trained on text alone" in text


@pytest.mark.parametrize("owner", ["teacher", "student"])
def test_the_chat_template_of_student_or_teacher_is_kept(made, tmp_path, owner: str) -> None:
    """Where the corpus's tokenizer, which is made by hand of the same tokens, has none."""
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    given, run = {}, made["number"]
    for name in ("teacher", "student"):
        given[name] = tmp_path / name
        shutil.copytree(run["teacher"]["path"], given[name])
        if name == owner:
            tokenizer = AutoTokenizer.from_pretrained(given[name])
            tokenizer.chat_template = template
            tokenizer.save_pretrained(given[name])
    new = RunFile.model_validate(
        run
        | {"out": str(tmp_path / "out"), "reuse": {"corpus": f"{run['out']}/corpus"}}
        | {"teacher": {"path": str(given["teacher"])}, "student": {"path": str(given["student"])}}
        | {"arms": {"distilled": {"max_tokens": 2 * 4 * SEQ_LEN}}}
    )
    for instance in (*NEEDED[1:], TRAIN):
        carry_out(new, instance)
    folder = Path(new.out) / TRAIN.name / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == template
    assert tokenizer.apply_chat_template([{"role": "user", "content": "3"}], tokenize=False) == "[user] 3 "


def test_a_trained_chat_student_keeps_the_special_tokens_that_the_corpus_does_not_know(made, tmp_path) -> None:
    run = made["number"]
    chat = save_chat_model(tmp_path / "chat", run["teacher"]["path"], max_position_embeddings=SEQ_LEN)
    reuse = {name: f"{run['out']}/{name}" for name in ("corpus", "teacher", "cache")}
    kept = {name: value for name, value in run.items() if name not in reuse}
    changes = {"out": str(tmp_path / "out"), "reuse": reuse, "student": {"path": chat}}
    new = RunFile.model_validate(kept | changes | {"arms": {"distilled": {"max_tokens": 2 * 4 * SEQ_LEN}}})
    for instance in (NEEDED[-1], TRAIN):
        manifest = carry_out(new, instance)
    folder, asked = Path(new.out) / TRAIN.name / "model", [{"role": "user", "content": "3"}]
    own, found = (AutoTokenizer.from_pretrained(path) for path in (chat, folder))
    assert found.get_vocab() == own.get_vocab() and found.eos_token == "<|im_end|>"
    assert found.apply_chat_template(asked, tokenize=False) == own.apply_chat_template(asked, tokenize=False)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == found.eos_token_id
    cache = read_manifest(Path(run["out"]) / "cache")
    assert cache is not None and manifest.facts["tokenizer"] == cache.facts["tokenizer"]


def test_a_cache_without_held_out_sequences_trains_the_same_student(made, tmp_path, caplog) -> None:
    given = made["number"]
    reuse = {stage: f"{given['out']}/{stage}" for stage in ("corpus", "teacher")}
    cache = given["cache"] | {"num_heldout_sequences": 0}
    run = RunFile.model_validate(given | {"out": str(tmp_path), "reuse": reuse, "cache": cache})
    for instance in NEEDED[2:]:
        carry_out(run, instance)
    with caplog.at_level(logging.INFO, "capgap"):
        without = carry_out(run, TRAIN)
    said = f"{TRAIN.name}: the cache has no held-out sequences: nearness to the teacher is not measured"
    assert said in caplog.messages
    rows = read_rows(tmp_path / TRAIN.name / "metrics.csv")
    assert rows and not any(row["heldout_top1"] or row["heldout_teacher_ce"] for row in rows)
    weights = [{f.path: f.sha256 for f in m.files} for m in (without, carry_out(RunFile.model_validate(given), TRAIN))]
    assert weights[0]["model/model.safetensors"] == weights[1]["model/model.safetensors"]


def test_a_logger_that_does_not_exist_is_refused_and_leaves_the_finished_student(made) -> None:
    run = made["number"]
    before = carry_out(RunFile.model_validate(run), TRAIN)
    wrong = RunFile.model_validate(run | {"train": run["train"] | {"loggers": ["tensorbord"]}})
    with pytest.raises(SettingError, match=r"train.loggers: no such logger; found tensorbord"):
        carry_out(wrong, TRAIN, remake=True)
    assert read_manifest(Path(run["out"]) / TRAIN.name) == before


def test_an_arm_has_its_own_settings(made) -> None:
    manifest = carry_out(RunFile.model_validate(made["number"]), Instance("train", "cross_entropy", 1))
    assert manifest.totals["num_steps"] == 2


def test_each_setting_of_loss_and_schedule_makes_another_student(with_both) -> None:
    chosen: list[dict[str, Any]] = [
        {},
        {"final_alpha": 0.0},
        {"final_alpha": 0.0, "alpha_schedule": "cosine"},
        {"token_weights": "entropy"},
        {"schedule": "wsd", "decay_fraction": 0.75, "decay_shape": "sqrt"},
        {"schedule": "wsd", "decay_fraction": 0.75, "decay_shape": "linear"},
    ]
    # four steps: with three, both shapes of alpha have the same middle
    made = [train(with_both, recording="topk", max_tokens=4 * 4 * SEQ_LEN, **settings) for settings in chosen]
    assert all(one != other for one, other in itertools.combinations(made, 2))


def test_checkpointed_activations_make_the_same_student(with_both) -> None:
    plain, checkpointed = (
        train(with_both, recording="topk", activation_checkpointing=value) for value in (False, True)
    )
    assert plain == checkpointed


def _reusing(run: dict[str, Any]) -> dict[str, Any]:
    """The run with its cache reused: the stage looks at what that keeps, where no section can say it before."""
    reuse = run.get("reuse", {}) | {"cache": f"{run['out']}/cache"}
    return {name: value for name, value in run.items() if name != "cache"} | {"reuse": reuse}


def test_draws_cannot_weigh_tokens_by_entropy(made) -> None:
    with pytest.raises(ValidationError, match=r"arms\.distilled\.token_weights: found entropy with a sampled cache"):
        train(made["number"], token_weights="entropy")
    with pytest.raises(MismatchError, match=r"the cache does not support these token weights; found sampled targets"):
        train(_reusing(made["number"]), token_weights="entropy")


def test_a_temperature_that_counts_in_a_later_step_only_is_looked_at_too(made) -> None:
    settings = {"alpha": 0.0, "final_alpha": 0.5, "temperature": 9}
    with pytest.raises(ValidationError, match=r"arms\.distilled\.temperature: found 9, expected 1, at which"):
        train(made["number"], **settings)
    with pytest.raises(
        SettingError, match=r"train\.temperature: .*no targets at this temperature; found 9, expected 1"
    ):
        train(_reusing(made["number"]), **settings)


def test_a_student_larger_than_memory_is_refused_before_its_weights_are_read(made, monkeypatch) -> None:
    monkeypatch.setattr("capgap.pipeline.train.fits.free_bytes", lambda device: 1000)
    monkeypatch.setattr("capgap.pipeline.train.stage.load_to_train", None)
    with pytest.raises(MachineError, match="cpu: the model does not fit into this device's memory; found 9"):
        train(made["number"])


def test_of_a_cache_with_both_recordings_the_named_one_is_trained_from(made, with_both) -> None:
    sampled = train(with_both, recording="sampled")
    assert sampled == train(made["number"]) == train(made["number"], recording="sampled")
    assert train(with_both, recording="topk") != sampled
    # cross-entropy alone reads no target, and needs none named
    without = train(with_both, recording=None, alpha=0.0)
    assert without == train(made["number"], alpha=0.0)
    assert without == train(with_both, recording=None, alpha=0, temperature=9)


def test_a_student_trains_at_each_temperature_that_the_cache_keeps(with_both, tmp_path) -> None:
    found = {value: train(with_both, recording="topk", temperature=value) for value in (None, 0.5, 1.0, 2.0)}
    assert found[None] == found[1.0]
    assert len({tuple(digests.values()) for digests in found.values()}) == 3
    # a cache that was recorded at 2 holds the same target as one that keeps 2 beside 1
    alone = with_both | {
        "out": str(tmp_path),
        "cache": with_both["cache"] | {"extra_temperatures": [], "temperature": 2.0},
    }
    for instance in NEEDED[2:]:
        carry_out(RunFile.model_validate(alone), instance)
    losses = []
    for run, temperature in ((with_both, 2.0), (alone, 2.0), (with_both, 1.0)):
        train(run, recording="topk", temperature=temperature)
        with (Path(run["out"]) / TRAIN.name / "metrics.csv").open() as file:
            losses.append(next(float(row["train_kl"]) for row in csv.DictReader(file) if row["train_kl"]))
    # logprobs are stored within 1/128 nat, and twice so far apart in two caches
    assert abs(losses[0] - losses[1]) < 1 / 64
    assert abs(losses[0] - losses[2]) > 4 / 64, "or the temperature makes no difference"


@pytest.mark.parametrize(
    ("settings", "before", "message"),
    [
        (
            {"recording": None},
            "arms.distilled.recording: found none named, expected one of sampled, topk",
            "train.recording: the cache has several recordings; found none named, expected one of sampled, topk",
        ),
        (
            {"recording": "sampled", "temperature": 2.0},
            "arms.distilled.temperature: found 2, expected 1, at which the cache is to be made; a topk cache can",
            "train.temperature: the cache's recording sampled has no targets at this temperature; found 2, expected 1;",
        ),
        (
            {"recording": "topk", "temperature": 3.0},
            "arms.distilled.temperature: found 3, expected 0.5 or 1 or 2, at which the cache is to be made; add it to",
            "train.temperature: the cache's recording topk has no targets at this temperature; found 3, "
            "expected one of 0.5, 1, 2;",
        ),
    ],
)
def test_what_a_cache_with_both_lacks_is_refused(
    with_both, settings: dict[str, Any], before: str, message: str
) -> None:
    """Before the cache is made, and where a finished one is reused."""
    with pytest.raises(ValidationError) as refused:
        train(with_both, **settings)
    assert before in str(refused.value)
    with pytest.raises(SettingError) as caught:
        train(_reusing(with_both), **settings)
    assert str(caught.value).startswith(message)


def test_what_is_refused_leaves_the_finished_student_where_it_was(with_both) -> None:
    weights = train(with_both, recording="topk")
    folder = Path(with_both["out"]) / TRAIN.name
    with pytest.raises(SettingError, match="has no targets at this temperature"):
        train(_reusing(with_both), recording="topk", temperature=3.0)
    manifest = read_manifest(folder)
    assert manifest is not None and (folder / "model" / "model.safetensors").is_file()
    assert weights == {file.path: file.sha256 for file in manifest.files if file.path.endswith(".safetensors")}


def test_a_recording_that_the_cache_lacks_is_refused(made) -> None:
    with pytest.raises(ValidationError, match=r"arms\.distilled\.recording: found topk, expected sampled, which is"):
        train(made["number"], recording="topk")
    message = r"train.recording: the cache has no such recording; found topk, expected sampled; set train.recording, or"
    with pytest.raises(SettingError, match=message):
        train(_reusing(made["number"]), recording="topk")
