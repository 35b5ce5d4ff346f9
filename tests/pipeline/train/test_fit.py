from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tasks import tiny_task

from capgap.pipeline.store import ShardReader
from capgap.pipeline.train.data import heldout_batches, num_validation_sequences
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.heldout import measure
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.objective import Objective
from capgap.pipeline.train.task import TrainingTask
from capgap.schemas.errors import CorruptError, InputError

SEQ_LEN = 16
NUM_SEQUENCES = 62  # 15 batches of 4 an epoch, and two sequences left over


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shards")
    return {
        "sampled": make_shards(folder / "sampled", "sampled", NUM_SEQUENCES),
        "topk": make_shards(folder / "topk", "topk", NUM_SEQUENCES),
        "heldout": make_shards(folder / "heldout", None, 12, seed=1),
    }


@pytest.fixture
def make_task(shards, tmp_path) -> Callable[..., TrainingTask]:
    def make(kind: str = "sampled", alpha: float = 1.0, **settings: Any) -> TrainingTask:
        given = {"batch_sequences": 4, "log_every_steps": 5, "learning_rate": 1e-2} | settings
        return tiny_task(tmp_path, shards[kind], shards["heldout"], given, alpha=alpha)

    return make


@pytest.mark.parametrize(
    ("kind", "alpha", "more", "names"),
    [
        ("sampled", 1.0, {}, "cross-entropy, KL to samples"),
        ("topk", 0.5, {}, "cross-entropy, KL to the top-k tokens"),
        ("topk", 1.0, {"divergence": "reverse_kl"}, "cross-entropy, reverse KL to the top-k tokens"),
        ("sampled", 0.0, {}, "cross-entropy"),
    ],
)
def test_losses_are_shown_by_name_and_of_every_arm_first_the_one_that_all_have(
    make_task, make_student, tmp_path, caplog, kind, alpha, more, names
) -> None:
    caplog.set_level("INFO", "capgap")
    task = make_task(kind, alpha, log_every_steps=1)
    fit(make_student(), dataclasses.replace(task, objective=Objective(**more)))
    (last,) = [one.getMessage() for one in caplog.records if "15 of 15 steps" in one.getMessage()]
    shown = last.partition(" s left, ")[2].split(", ")
    assert ", ".join(part.rpartition(" ")[0] for part in shown) == names
    # the same scale whatever the arm learns from: nats a token of the text
    assert float(shown[0].rpartition(" ")[2]) == pytest.approx(_column(tmp_path, "train_ce")[-1][1], abs=1e-3)


def _metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _column(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in _metrics(folder) if row[name]]


@pytest.mark.parametrize("kind, alpha", [("sampled", 1.0), ("topk", 0.5), ("sampled", 0.0)])
def test_training_lowers_the_held_out_loss(make_task, make_student, tmp_path, kind, alpha) -> None:
    totals = fit(make_student(), make_task(kind, alpha, num_epochs=4, validate_every_steps=20))
    assert totals == {"num_steps": 60, "num_tokens": 60 * 4 * SEQ_LEN, "num_epochs": 4.0}
    validation = _column(tmp_path, "validation_loss")
    assert [step for step, _ in validation] == [20, 40, 60]
    losses = [loss for _, loss in validation]
    # an untrained student stands at log 40 = 3.69, the chain's entropy at 1.5; over orders of the data, cross-entropy
    # alone falls by 0.26 to 0.39 between these steps
    assert losses[0] < math.log(40) and losses[-1] < losses[0] - 0.2
    assert [step for step, _ in _column(tmp_path, "train_loss")] == [*range(5, 61, 5)]
    assert _column(tmp_path, "num_tokens")[0] == (5, 5 * 4 * SEQ_LEN)
    assert len(_column(tmp_path, "train_kl")) == (0 if alpha == 0 else 12)


@pytest.mark.parametrize(
    "objective",
    [
        Objective("reverse_kl"),
        Objective("jsd"),
        Objective("jsd", "renorm", 0.1),
        Objective("forward_kl", "label"),
        Objective("forward_kl", "drop"),
    ],
    ids=lambda objective: f"{objective.divergence}-{objective.tail}-{objective.beta}",
)
def test_every_objective_teaches_its_own_student(make_task, make_student, tmp_path, objective: Objective) -> None:
    settings = {"num_epochs": 4, "validate_every_steps": 20}
    student, plain = make_student(), make_student()
    fit(student, dataclasses.replace(make_task("topk", **settings), objective=objective))
    losses = [loss for _, loss in _column(tmp_path, "validation_loss")]
    # as in the test above, of the forward KL
    assert losses[0] < math.log(40) and losses[-1] < losses[0] - 0.2
    shutil.rmtree(tmp_path / "work")
    fit(plain, make_task("topk", **settings))
    assert not torch.equal(
        *(torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (student, plain))
    )


@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_a_training_that_decodes_on_the_device_takes_the_same_steps(make_task, make_student, tmp_path, kind) -> None:
    found: dict[str, Any] = {}
    for decode in ("host", "device"):
        student = make_student()
        fit(student, make_task(kind, 0.5, num_epochs=2, micro_batch_sequences=2, decode=decode, log_every_steps=1))
        weights = torch.cat([p.detach().flatten() for p in student.parameters()])
        found[decode] = (weights, [loss for _, loss in _column(tmp_path, "train_loss")])
        shutil.rmtree(tmp_path / "work")
    (weights, losses), (other_weights, other_losses) = found["host"], found["device"]
    assert len(losses) == len(other_losses) == 30
    if kind == "sampled":  # counts over samples: the same bits
        assert losses == other_losses
        assert torch.equal(weights, other_weights)
    # exp of two libraries: probabilities differ by 1e-7, and metrics.csv keeps six digits
    assert losses == pytest.approx(other_losses, abs=1e-4)


@pytest.mark.parametrize("decode", ["host", "device"])
def test_targets_that_are_not_aligned_stop_a_training(make_task, make_student, shards, monkeypatch, decode) -> None:
    """The shards are sound; what a host or a device takes for the labels' logprobs is not."""
    error = dataclasses.replace(shards["topk"].codec.error, label_nats=-1.0)
    monkeypatch.setattr(type(shards["topk"].codec), "error", error)
    with pytest.raises(CorruptError, match=r"shard-.*, sequence \d+, target \d+: targets are not aligned"):
        fit(make_student(), make_task("topk", decode=decode))


def test_the_same_training_twice_gives_the_same_bits_and_leaves_the_model_for_use(make_task, make_student) -> None:
    students = [make_student(), make_student(), make_student(seed=1)]
    for student in students:
        for path in make_task().folder.rglob("*.ckpt"):
            path.unlink()
        fit(student, make_task(max_tokens=10 * 4 * SEQ_LEN))
        assert not student.training
    a, b, c = (torch.cat([p.detach().flatten() for p in s.parameters()]) for s in students)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_take_the_steps_of_the_whole_batch_in_every_epoch(
    make_task, make_student, micro_batch: int
) -> None:
    def weights(**settings: Any) -> torch.Tensor:
        student = make_student()
        fit(student, make_task(num_epochs=2, **settings))
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    whole = weights()
    shutil.rmtree(make_task().folder / "work")
    parts = weights(micro_batch_sequences=micro_batch)
    start = torch.cat([p.detach().flatten() for p in make_student().parameters()])
    # a gradient summed in another order; Adam divides small ones by their size, so single weights stray further
    assert float((whole - parts).norm() / (whole - start).norm()) < 0.01


def test_the_best_weights_are_handed_on_where_they_are_asked_for(make_task, make_student, tmp_path) -> None:
    """At a learning rate that rises until the loss does."""
    student = make_student()
    settings = {"learning_rate": 3.0, "final_learning_rate_ratio": 1.0, "warmup_fraction": 0.9, "num_epochs": 2}
    task = make_task(validate_every_steps=2, checkpoint_every_steps=3, output="best", **settings)
    totals = fit(student, task)
    measured = {loss: step for step, loss in _column(tmp_path, "validation_loss")}
    best = min(measured)
    assert (totals["best_step"], totals["best_validation_loss"]) == (measured[best], best)
    assert best < list(measured)[-1] - 0.01
    module = DistillationModule(student, task.settings, 1, 0.0, 1.0, task.training.codec.vocab_size)
    num_sequences = num_validation_sequences(task, totals["num_steps"])
    assert measure(module, heldout_batches(task, num_sequences)).loss == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("given, steps", [(1, None), (63, None), (64, 1), (20 * 64 + 63, 20), (10**9, 30)])
def test_max_tokens_is_never_passed(make_task, make_student, tmp_path, given: int, steps: int | None) -> None:
    task = make_task(max_tokens=given, num_epochs=2)
    if steps is None:
        with pytest.raises(InputError, match=r"max_tokens: not enough data for one step .* found \d+, .* at least 64"):
            fit(make_student(), task)
        return
    assert fit(make_student(), task)["num_steps"] == steps
    assert _metrics(tmp_path)[-1]["step"] == str(steps)


@pytest.mark.parametrize("settings", [{}, {"micro_batch_sequences": 1}])
def test_too_few_sequences_for_a_batch_are_refused(make_task, make_student, settings) -> None:
    with pytest.raises(InputError, match=r"one step.*found 62 sequences, expected at least"):
        fit(make_student(), make_task(batch_sequences=64, **settings))


def test_a_training_that_diverges_stops_with_its_step(make_task, make_student, tmp_path) -> None:
    message = r"training step \d+: the (loss|gradient's norm) is not finite.*lower the learning rate"
    with pytest.raises(InputError, match=message):
        fit(make_student(), make_task(learning_rate=1e30, log_every_steps=1))
    assert all(math.isfinite(loss) for _, loss in _column(tmp_path, "train_loss"))


def test_weights_that_are_not_finite_are_refused_before_the_first_step(make_task, make_student) -> None:
    student = make_student()
    with torch.no_grad():
        student.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"llama: this model's head .*found logits that are not finite"):
        fit(student, make_task())


@pytest.mark.slow
def test_a_compiled_training_has_the_losses_of_a_plain_one(make_task, make_student, tmp_path) -> None:
    settings = {"log_every_steps": 1, "max_tokens": 4 * 4 * SEQ_LEN, "validate_every_steps": 2}
    fit(make_student(), make_task(**settings))
    plain = {name: _column(tmp_path, name) for name in ("train_loss", "validation_loss")}
    student = make_student()
    names = list(student.state_dict())
    fit(student, make_task(compile=True, **settings))
    assert list(student.state_dict()) == names, "it is saved under its own names"
    for name, values in plain.items():
        # float32 in another order, over four steps
        assert _column(tmp_path, name) == [(step, pytest.approx(value, rel=1e-3)) for step, value in values]


# Imports once, then trains in forked processes, each of which may be killed as soon as metrics.csv names a step.
FORKED = """
import json, os, signal, sys, time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from capgap.pipeline.store import ShardReader
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.task import TrainingTask
from capgap.schemas.manifest import ShardSet
from capgap.schemas.run_optimization import OptimizationSettings

def train(job):
    folder = Path(job["folder"])
    model = LlamaForCausalLM.from_pretrained(job["student"])
    readers = [ShardReader(Path(path), ShardSet.model_validate_json(text)) for path, text in job["shards"]]
    settings = OptimizationSettings.model_validate(job["settings"])
    step = DistillationModule.training_step

    def held_up(self, batch, batch_idx):
        if job["kill_at"] is not None and self.trainer.global_step > job["kill_at"] + 20:
            signal.pause()  # it is killed soon, however busy the machine
        return step(self, batch, batch_idx)

    DistillationModule.training_step = held_up
    fit(model, TrainingTask("train", settings, *readers, 1.0, 1.0, 0, "cpu", folder))
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "weights.safetensors")

def last_step(folder):
    try:
        return int((Path(folder) / "metrics.csv").read_text().splitlines()[-1].split(",")[0])
    except (OSError, IndexError, ValueError):
        return 0

for job in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        train(job)
        os._exit(0)
    while job["kill_at"] is not None and last_step(job["folder"]) < job["kill_at"]:
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("the training ended before it could be killed")
        time.sleep(0.001)
    if job["kill_at"] is not None:
        time.sleep(job["delay_s"])
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status == (0 if job["kill_at"] is None else signal.SIGKILL), status
    print(json.dumps((Path(job["folder"]) / "metrics.csv").read_text().splitlines()), flush=True)
"""


@pytest.mark.parametrize("micro_batch", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_a_killed_training_goes_on_as_if_undisturbed(shards, make_student, tmp_path, micro_batch: int) -> None:
    """For whole batches and for accumulated ones: equal bits, and every row of the metrics once."""
    make_student().save_pretrained(tmp_path / "student")
    rng = random.Random()
    jobs = []
    settings = {
        "batch_sequences": 4,
        "micro_batch_sequences": micro_batch,
        "num_epochs": 9,
        "log_every_steps": 5,
        "checkpoint_every_steps": 10,
        "validate_every_steps": 20,
    }
    for name, kills in [("undisturbed", []), ("killed", [rng.randint(11, 40), rng.randint(41, 70)])]:
        folder = tmp_path / name
        folder.mkdir()
        job = {
            "folder": str(folder),
            "student": str(tmp_path / "student"),
            "shards": [
                (str(shards[part].place.folder), shards[part].shard_set.model_dump_json())
                for part in ("sampled", "heldout")
            ],
            "settings": settings,
        }
        jobs += [job | {"kill_at": kill, "delay_s": rng.uniform(0, 0.03)} for kill in [*kills, None]]
    done = subprocess.run(
        [sys.executable, "-c", FORKED, json.dumps(jobs)], env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seen = [(job["kill_at"], job["delay_s"]) for job in jobs]
    _require_resumed(jobs, [json.loads(line) for line in done.stdout.splitlines()])
    undisturbed, killed = (tmp_path / name for name in ("undisturbed", "killed"))
    weights = [(folder / "weights.safetensors").read_bytes() for folder in (undisturbed, killed)]
    assert weights[0] == weights[1], f"killed at {seen}"
    of_this_process = dict.fromkeys(("tokens_per_s", "data_wait_fraction", "memory_bytes", "heldout_s"))
    rows = [[row | of_this_process for row in _metrics(folder)] for folder in (undisturbed, killed)]
    assert rows[0] == rows[1], f"killed at {seen}"
    steps = [step for step, _ in _column(killed, "train_loss")]
    assert steps == [*range(5, 136, 5)]
    assert len(list((killed / "work" / "checkpoints").iterdir())) == 2, "the last two, and nothing half saved"


def _require_resumed(jobs: list[dict[str, Any]], metrics: list[list[str]]) -> None:
    """Rows up to the checkpoint stay as they are, tokens a second and all; a step that is taken again has another."""
    for job, before, after in zip(jobs, metrics, metrics[1:], strict=False):
        if job["kill_at"] is None:
            continue
        checkpoint = (job["kill_at"] - 1) // 10 * 10  # the newest, or the one before it
        kept = [line for line in before[1:] if int(line.split(",")[0]) <= checkpoint]
        assert kept and after[1 : len(kept) + 1] == kept, f"killed at {job['kill_at']}, begun again from the start"


@pytest.fixture(scope="module")
def damaged(make_shards, tmp_path_factory) -> Callable[[int], ShardReader]:
    """1003 sequences, so that one may be damaged: the last member holds one, the others six; a bit of one is turned."""
    folder = tmp_path_factory.mktemp("damaged")
    reader = make_shards(folder / "sound", "sampled", 1003)

    def damage(member: int) -> ShardReader:
        copy = folder / f"damaged-{member}"
        shutil.copytree(folder / "sound", copy, dirs_exist_ok=True)
        shard = reader.shard_set.shards[-1]
        with (copy / shard.file.path).open("r+b") as file:
            file.seek(shard.member(member).offset + 20)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        return ShardReader(copy, reader.shard_set)

    return damage


def test_a_training_that_skips_a_damaged_block_takes_every_step_and_says_what_it_skipped(
    make_task, make_student, damaged
) -> None:
    reader = damaged(1)
    task = dataclasses.replace(make_task(batch_sequences=59, on_corrupt="skip", log_every_steps=1), training=reader)
    totals = fit(make_student(), task)
    assert totals["num_steps"] == 17 and totals["num_tokens"] == 1003 * SEQ_LEN
    assert totals["skipped_sequences"] == {reader.name_of(83, 1): 1}
    assert [step for step, _ in _column(task.folder, "train_loss")] == [*range(1, 18)]


@pytest.mark.parametrize(
    ("member", "on_corrupt", "message"),
    [(1, "stop", "member .*checksum mismatch"), (0, "skip", "too much is damaged .* found 6 sequences in 1 members")],
)
def test_a_training_stops_at_damage_unless_told_otherwise_and_at_too_much_of_it(
    make_task, make_student, damaged, member: int, on_corrupt: str, message: str
) -> None:
    task = dataclasses.replace(make_task(batch_sequences=59, on_corrupt=on_corrupt), training=damaged(member))
    with pytest.raises(CorruptError, match=message):
        fit(make_student(), task)
