"""The student's first weights: fresh from a seed, or those of a given model, unchanged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chats import save_chat_model
from tiny_runs import SEQ_LEN, settings_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from capgap.pipeline.models.text import RunText
from capgap.pipeline.stage.context import Instance, StageInput
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import SettingError
from capgap.schemas.run_file import RunFile

SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_fresh_weights_differ_by_seed_and_by_nothing_else(make_corpus_run) -> None:
    run = RunFile.model_validate({**make_corpus_run().model_dump(), "student": {"model": SHAPE}, "seeds": [0, 1]})
    carry_out(run, Instance("corpus"))
    first, second = (carry_out(run, Instance("student", seed=seed)) for seed in (0, 1))
    again = carry_out(run, Instance("student", seed=0), remake=True)
    assert first.content == again.content != second.content
    assert first.facts["num_parameters"] == second.facts["num_parameters"]


def test_a_given_model_s_weights_arrive_unchanged_with_the_corpus_s_tokenizer(make_corpus_run, tmp_path: Path) -> None:
    made = RunFile.model_validate({**make_corpus_run().model_dump(), "student": {"model": SHAPE}})
    carry_out(made, Instance("corpus"))
    carry_out(made, Instance("student", seed=0))
    source = (Path(made.out) / "student" / "seed-0" / "model").rename(tmp_path / "given")
    given = RunFile.model_validate({**made.model_dump(), "student": {"path": str(source)}})
    manifest = carry_out(given, Instance("student", seed=0), remake=True)
    folder = Path(given.out) / "student" / "seed-0" / "model"
    before, after = _weights(source), _weights(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
    assert {Path(entry.path).name for entry in manifest.sources} >= {"model.safetensors", "config.json"}


ASKED = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("source", ["path", "prune"])
def test_a_chat_student_keeps_the_special_tokens_that_the_corpus_does_not_know(
    tiny, tmp_path: Path, source: str
) -> None:
    chat = save_chat_model(tmp_path / "chat", tiny["teacher"]["path"], max_position_embeddings=SEQ_LEN)
    changes: dict[str, Any] = {"out": str(tmp_path / "run"), "reuse": {"corpus": f"{tiny['out']}/corpus"}}
    changes |= {"path": {"student": {"path": chat}}, "prune": {"teacher": {"path": chat}, "student": {"prune": {}}}}[
        source
    ]
    run = RunFile.model_validate({name: value for name, value in tiny.items() if name != "corpus"} | changes)
    if source == "prune":
        carry_out(run, Instance("teacher"))
    manifest = carry_out(run, Instance("student", seed=1))
    folder = Path(run.out) / "student/seed-1/model"
    own, found = (AutoTokenizer.from_pretrained(path) for path in (chat, folder))
    ids = found.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert ids == own.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert ids.count(found.convert_tokens_to_ids("<|im_start|>")) == 2
    assert GenerationConfig.from_pretrained(folder).eos_token_id == found.convert_tokens_to_ids("<|im_end|>")
    # the corpus decides which ids there are to be learnt
    corpus = StageInput(Path(tiny["out"]) / "corpus", read_manifest(Path(tiny["out"]) / "corpus"))
    assert manifest.facts["tokenizer"] == RunText(corpus).facts.tokenizer.model_dump()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Any]:
    """A run whose corpus and teacher, given, are made."""
    run = settings_of(tmp_path_factory.mktemp("pruned") / "run", "number")
    for instance in (Instance("corpus"), Instance("teacher")):
        carry_out(RunFile.model_validate(run), instance)
    return run


def _pruned(run: dict[str, Any], **prune: Any) -> RunFile:
    return RunFile.model_validate(run | {"student": {"prune": prune}, "seeds": [0, 1]})


def test_a_teacher_pruned_to_its_own_shape_is_the_teacher(tiny: dict[str, Any]) -> None:
    run = _pruned(tiny)
    manifest = carry_out(run, Instance("student", seed=0), remake=True)
    before, after = _weights(Path(tiny["teacher"]["path"])), _weights(Path(run.out) / "student/seed-0/model")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert manifest.totals["kl_of_student"] == 0
    assert manifest.totals["heldout_loss_of_teacher"] == manifest.totals["heldout_loss_of_student"]
    assert set(manifest.inputs) == {"corpus", "teacher"}


@pytest.mark.usefixtures("without_16_bits")
def test_a_student_has_its_teacher_s_dtype_though_it_was_scored_in_float32(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny["teacher"]["path"], teacher)
    AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16).save_pretrained(teacher)
    changes = {
        "out": str(tmp_path / "run"),
        "reuse": {"corpus": f"{tiny['out']}/corpus"},
        "teacher": {"path": str(teacher)},
    }
    run = _pruned({name: value for name, value in tiny.items() if name != "corpus"} | changes)
    for instance in (Instance("teacher"), Instance("student", seed=0)):
        carry_out(run, instance)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
        for folder in (teacher, Path(run.out) / "student/seed-0/model")
    )
    # of its own shape: not a number has changed
    assert all(weight.dtype == torch.bfloat16 for weight in after.values())
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("importance", ["activation", "taylor", "random"])
def test_a_pruned_teacher_says_what_went_and_what_that_cost(tiny: dict[str, Any], importance: str) -> None:
    run = _pruned(tiny, hidden_size=24, num_heads=1, num_key_value_heads=1, intermediate_size=20, importance=importance)
    made = [carry_out(run, Instance("student", seed=seed), remake=True) for seed in (0, 1)]
    folder = Path(run.out) / "student/seed-0"
    report = json.loads((folder / "prune.json").read_text())
    assert [len(report["kept"][name]) for name in ("layers", "hidden")] == [1, 24]
    assert [len(report["kept"][name][0]) for name in ("heads", "key_value_heads", "neurons")] == [1, 1, 20]
    assert [len(report["scores"][name][0]) for name in ("heads", "neurons")] == [2, 32]
    totals = made[0].totals
    assert {name: totals[name] for name in report["figures"]} == report["figures"]
    assert totals["kl_of_student"] > 0.001 and totals["heldout_loss_of_student"] != totals["heldout_loss_of_teacher"]
    teacher, student = (_weights(p) for p in (Path(tiny["teacher"]["path"]), folder / "model"))
    kept = torch.tensor(report["kept"]["hidden"])
    assert torch.equal(student["model.embed_tokens.weight"], teacher["model.embed_tokens.weight"][:, kept])
    # a seed decides what is drawn, and nothing else of a pruning
    assert (made[0].content == made[1].content) == (importance != "random")


def test_layers_can_be_scored_by_the_loss_without_them(tiny: dict[str, Any]) -> None:
    run = _pruned(tiny, layers="loss", num_sequences=4)
    carry_out(run, Instance("student", seed=0), remake=True)
    report = json.loads((Path(run.out) / "student/seed-0/prune.json").read_text())
    assert report["figures"]["num_calibration_sequences"] == 4
    assert len(report["scores"]["layers"]) == 1 and report["scores"]["layers"][0] != 0


def test_a_shape_that_the_teacher_cannot_give_is_refused_before_the_folder_is_emptied(tiny: dict[str, Any]) -> None:
    carry_out(_pruned(tiny), Instance("student", seed=0), remake=True)
    wrong = _pruned(tiny, num_layers=2)
    with pytest.raises(SettingError, match=r"student\.prune\.num_layers: .* found 2, expected at most the teacher's 1"):
        carry_out(wrong, Instance("student", seed=0))
    assert states(_pruned(tiny))["student/seed-0"].state is State.CURRENT
