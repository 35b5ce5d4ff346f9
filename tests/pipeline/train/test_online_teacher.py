"""Arms that ask the teacher itself, through the stages; teacher and student are as small as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import SEQ_LEN, save_teacher, settings_of
from transformers import AutoModelForCausalLM

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.train import online_teacher
from capgap.pipeline.train.online_teacher import free_bytes, require_room
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import MachineError, MismatchError
from capgap.schemas.facts import ModelFacts, TokenizerFacts
from capgap.schemas.run_file import RunFile

NUM_STEPS = 20


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict[str, Any]:
    """A run whose cache keeps every id without loss, all that training needs made."""
    folder = tmp_path_factory.mktemp("run")
    settings = settings_of(folder / "number", "number")
    texts = [path.read_text() for path in sorted((folder / "number").glob("*.txt"))]
    vocab_size = save_teacher(folder / "number" / "other", texts, 3)
    settings |= {
        "cache": {"engine": "transformers", "recording": "topk", "top_k": vocab_size, "profile": "lossless"},
        "train": {"batch_sequences": 4, "log_every_steps": 2, "max_tokens": NUM_STEPS * 4 * SEQ_LEN},
        "arms": {"distilled": {}, "online": {"targets": "online"}, "cross_entropy": {"alpha": 0.0}},
    }
    for instance in (Instance("corpus"), Instance("teacher"), Instance("cache"), Instance("student", seed=1)):
        carry_out(RunFile.model_validate(settings), instance)
    return settings


def _weights(run: dict[str, Any], arm: str, **settings: Any) -> dict[str, torch.Tensor]:
    """Of the student that the arm trains, with settings of the arm's own."""
    changed = RunFile.model_validate(run | {"arms": run["arms"] | {arm: run["arms"][arm] | settings}})
    carry_out(changed, Instance("train", arm, 1), remake=True)
    return AutoModelForCausalLM.from_pretrained(Path(run["out"]) / f"train/{arm}/seed-1/model").state_dict()


def _apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("settings", [{}, {"divergence": "jsd", "alpha": 0.5}], ids=["forward_kl", "jsd"])
def test_a_cache_that_loses_nothing_trains_the_same_student(run, settings: dict[str, Any]) -> None:
    cached, online = (_weights(run, arm, **settings) for arm in ("distilled", "online"))
    # both sum in float32, in other orders, and Adam divides by small gradients; a step moves a weight by 3e-3 at most
    assert _apart(cached, online) < 3e-4
    assert _apart(cached, _weights(run, "cross_entropy")) > 3e-3, "or any two trainings would pass"


def test_it_trains_at_a_temperature_that_the_cache_does_not_keep(run) -> None:
    assert _apart(_weights(run, "online", temperature=3.0), _weights(run, "online")) > 1e-3


def test_another_teacher_than_the_caches_is_refused(run, tmp_path) -> None:
    other = Path(run["teacher"]["path"]).with_name("other")
    out = Path(run["out"])
    changed = run | {
        "out": str(tmp_path),
        "teacher": {"path": str(other)},
        "reuse": {"corpus": str(out / "corpus"), "cache": str(out / "cache")},
    }
    changed = RunFile.model_validate(changed)
    for instance in (Instance("teacher"), Instance("student", seed=1)):
        carry_out(changed, instance)
    with pytest.raises(MismatchError, match="cache: the cache was made by another teacher than the one that is asked"):
        carry_out(changed, Instance("train", "online", 1))
    assert carry_out(changed, Instance("train", "distilled", 1)).totals["num_steps"] == NUM_STEPS


def _facts(num_parameters: int, num_outside: int) -> ModelFacts:
    return ModelFacts(
        tokenizer=TokenizerFacts(fingerprint="", vocab_size=10, eos_id=0),
        num_parameters=num_parameters,
        num_non_embedding_parameters=num_parameters - num_outside,
        padded_vocab_size=10,
        max_positions=8,
        path="model",
    )


def test_two_models_that_do_not_fit_together_are_refused_before_they_are_loaded() -> None:
    student, teacher = _facts(10**9, 10**8), _facts(7 * 10**9, 5 * 10**8)
    # 16 GB of weights, gradients and moments; 14 GB of weights in bfloat16 and 2 GB of a head in float32
    needed = 32 * 10**9
    require_room(student, torch.float32, teacher, torch.bfloat16, "cuda:0", needed)
    message = (
        r"train.targets: online: teacher and student do not fit on the device together; found 32.0 GB free on cuda:0, "
        r"expected 16.0 GB for the student in training and 16.0 GB for the teacher, and more for "
        r"activations; learn from the cache \(targets: cache\), which needs no teacher on the device"
    )
    with pytest.raises(MachineError, match=message):
        require_room(student, torch.float32, teacher, torch.bfloat16, "cuda:0", needed - 1)
    require_room(student, torch.bfloat16, teacher, torch.bfloat16, "cuda:0", needed - 8 * 10**9)


def test_a_student_that_is_divided_among_devices_counts_with_its_part_on_each() -> None:
    student, teacher = _facts(10**9, 10**8), _facts(7 * 10**9, 5 * 10**8)
    needed = 4 * 10**9 + 16 * 10**9
    require_room(student, torch.float32, teacher, torch.bfloat16, "cuda:0", needed, num_parts=4)
    with pytest.raises(MachineError, match=r"4\.0 GB for the student in training and 16\.0 GB for the teacher"):
        require_room(student, torch.float32, teacher, torch.bfloat16, "cuda:0", needed - 1, num_parts=4)


def test_weights_of_the_student_that_are_on_the_device_already_are_not_counted_twice(run, monkeypatch) -> None:
    """On a CPU the student is loaded before the free memory is read."""
    out = Path(run["out"])
    student, teacher = (
        ModelFacts.model_validate(json.loads((out / stage / "manifest.json").read_bytes())["facts"])
        for stage in ("student/seed-1", "teacher")
    )
    # the gradients and moments of the student; the teacher's weights and its head once more, all in float32
    outside = teacher.num_parameters - teacher.num_non_embedding_parameters
    free = 4 * (3 * student.num_parameters + teacher.num_parameters + outside)
    monkeypatch.setattr(online_teacher, "free_bytes", lambda device: free)
    assert carry_out(RunFile.model_validate(run), Instance("train", "online", 1), remake=True).totals["num_steps"]
    monkeypatch.setattr(online_teacher, "free_bytes", lambda device: 4 * teacher.num_parameters)
    with pytest.raises(MachineError, match="teacher and student do not fit on the device together"):
        carry_out(RunFile.model_validate(run), Instance("train", "online", 1), remake=True)


def test_the_memory_that_is_left_is_found() -> None:
    assert 0 < free_bytes("cpu") < 1 << 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU can be used")
def test_the_memory_that_is_left_on_a_gpu_is_found() -> None:
    before = free_bytes("cuda:0")
    held = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
    assert 0 < free_bytes("cuda:0") <= before - held.numel()
