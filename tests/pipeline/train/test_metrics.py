"""metrics.csv: its rows across a kill, and what its columns are."""

from __future__ import annotations

import csv
import dataclasses
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from tiny_tasks import tiny_task

from capgap.pipeline.store import Batch, SequenceLoader
from capgap.pipeline.train import fit as fit_module
from capgap.pipeline.train import heldout as heldout_module
from capgap.pipeline.train import metrics as metrics_module
from capgap.pipeline.train import timer as timer_module
from capgap.pipeline.train.data import training_loader
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.heldout import HeldOutFigures, measure
from capgap.pipeline.train.metrics import COLUMNS, MetricsFile, memory_bytes, read_rows
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.objective import Objective
from capgap.pipeline.train.task import TrainingTask
from capgap.pipeline.train.timer import TimedLoader, TrainingTimer

SEQ_LEN, V = 16, 40


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("first", "last"), [(0.0, 1.0), (1.0, 0.0)])
def test_train_kl_is_a_mean_over_the_micro_batches_that_have_a_divergence(task, make_student, first, last) -> None:
    """At alpha 0 none is computed: it is no 0 in the mean, and takes nothing away from the others'."""
    moving = dataclasses.replace(task, alpha=first, objective=Objective(final_alpha=last))

    def trained(every_steps: int) -> list[dict[str, str]]:
        folder = task.folder / f"every-{every_steps}"
        folder.mkdir()
        settings = task.settings.model_copy(update={"log_every_steps": every_steps})
        fit(make_student(), dataclasses.replace(moving, folder=folder, settings=settings))
        return [row for row in _rows(folder / "metrics.csv") if row["train_loss"]]

    each = {int(row["step"]): row["train_kl"] for row in trained(1)}
    assert [step for step, kl in each.items() if not kl] == [1 if first == 0 else 7]
    rows = {int(row["step"]): row["train_kl"] for row in trained(4)}
    assert list(rows) == [4, 7]
    for begin, end in ((1, 4), (5, 7)):
        known = [float(each[step]) for step in range(begin, end + 1) if each[step]]
        # figures of six digits
        assert float(rows[end]) == pytest.approx(sum(known) / len(known), abs=2e-6)


def test_rows_past_the_checkpoint_and_a_torn_row_are_dropped(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    for step in (5, 10, 15):
        file.add(step=step, train_loss=1.5, tokens_per_s=100.0)
    with path.open("a") as torn:
        torn.write("20,0.5,3" + "," * (len(COLUMNS) - 3))
    MetricsFile(path, 10).add(step=15, train_loss=1.25, tokens_per_s=90.0)
    assert [(row["step"], row["train_loss"]) for row in _rows(path)] == [("5", "1.5"), ("10", "1.5"), ("15", "1.25")]


def test_a_fresh_training_forgets_what_an_earlier_one_logged(tmp_path) -> None:
    MetricsFile(tmp_path / "metrics.csv", 0).add(step=5, tokens_per_s=1.0)
    MetricsFile(tmp_path / "metrics.csv", 0)
    assert _rows(tmp_path / "metrics.csv") == []


def test_a_file_with_fewer_columns_is_gone_on_with(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train_loss,tokens_per_s\r\n5,0.1,1.5,9.0\r\n10,0.2,1.25,9.5\r\n15,0.3,")
    MetricsFile(path, 10).add(step=15, train_loss=1.0, data_wait_fraction=0.5)
    found = [(row["step"], row["train_loss"], row["tokens_per_s"], row["data_wait_fraction"]) for row in _rows(path)]
    assert found == [("5", "1.5", "9.0", ""), ("10", "1.25", "9.5", ""), ("15", "1.0", "", "0.5")]


def test_of_no_file_there_are_no_rows(tmp_path) -> None:
    assert read_rows(tmp_path / "metrics.csv") == []
    (tmp_path / "metrics.csv").write_text("st")
    assert read_rows(tmp_path / "metrics.csv") == []


@pytest.fixture
def task(make_shards, tmp_path) -> TrainingTask:
    """Steps of 6 sequences in micro-batches of 2; a row every 3 steps."""
    settings = {"batch_sequences": 6, "micro_batch_sequences": 2, "log_every_steps": 3, "learning_rate": 1e-2}
    training = make_shards(tmp_path / "shards", "topk", 42)
    heldout = make_shards(tmp_path / "heldout", None, 6, seed=1)
    return tiny_task(tmp_path, training, heldout, settings | {"clip_norm": 0.05, "loggers": []}, alpha=0.5)


def test_losses_and_norms_are_means_over_the_interval_and_the_norm_is_before_clipping(task, make_student) -> None:
    """Held against a loop of its own in plain torch."""
    student = make_student()
    module = DistillationModule(make_student(), task.settings, 7, task.alpha, 1.0, V)
    fit(student, task)
    optimizer = module.configure_optimizers()["optimizer"]
    schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    expected, values, norms = [], [], []
    for number, batch in enumerate(training_loader(task)):
        out = module.loss(batch, task.alpha)
        (out.loss / 3).backward()
        values.append([float(out.loss), float(out.kl_N.mean()), float(out.ce_N.mean())])
        if (number + 1) % 3:
            continue
        step = (number + 1) // 3
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), 0.05)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * schedule(step - 1)
        optimizer.step()
        optimizer.zero_grad()
        if step in (3, 6, 7):
            expected.append((step, *torch.tensor(values).mean(0).tolist(), sum(norms) / len(norms)))
            values, norms = [], []
    rows = [row for row in _rows(task.folder / "metrics.csv") if row["train_loss"]]
    names = ("step", "train_loss", "train_kl", "train_ce", "gradient_norm")
    # the same sums in another order of float32
    assert [[float(row[name]) for name in names] for row in rows] == [pytest.approx(one, abs=2e-4) for one in expected]
    assert all(float(row["gradient_norm"]) > 0.05 for row in rows)
    assert torch.allclose(next(student.parameters()), next(module.model.parameters()), atol=1e-5)


class Ticks:
    """A timer that stands still unless it is told how much time passes."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_waiting_and_the_rate_leave_measurements_out(task, make_student, monkeypatch) -> None:
    """Each micro-batch is waited for 3 s and worked on 1 s; each measurement takes 100 s."""
    ticks = Ticks()
    for module in (timer_module, metrics_module):
        monkeypatch.setattr(module, "time", ticks)

    class Slow:
        def __init__(self, loader: SequenceLoader) -> None:
            self._loader = loader

        def __getattr__(self, name: str) -> Any:
            return getattr(self._loader, name)

        def __len__(self) -> int:
            return len(self._loader)

        def __iter__(self) -> Iterator[Batch]:
            for batch in self._loader:
                ticks.now += 3
                yield batch

    def worked(*given: Any) -> torch.Tensor:
        ticks.now += 1
        return training_step(*given)

    def measured(*given: Any) -> HeldOutFigures:
        ticks.now += 100
        return measure(*given)

    training_step = DistillationModule.training_step
    monkeypatch.setattr(DistillationModule, "training_step", worked)
    monkeypatch.setattr(fit_module, "training_loader", lambda task: Slow(training_loader(task)))
    monkeypatch.setattr(heldout_module, "measure", measured)
    settings = task.settings.model_copy(update={"validate_every_steps": 1})
    fit(make_student(), dataclasses.replace(task, settings=settings))
    rows = [row for row in _rows(task.folder / "metrics.csv") if row["tokens_per_s"]]
    # three, three and one step of three micro-batches
    for row, num_steps in zip(rows, (3, 3, 1), strict=True):
        assert float(row["data_wait_fraction"]) == 0.75
        assert float(row["tokens_per_s"]) == round(num_steps * 6 * SEQ_LEN / (num_steps * 3 * 4), 1)


def test_a_loader_under_a_clock_is_the_same_loader(task) -> None:
    plain, timer = training_loader(task), TrainingTimer()
    clocked = TimedLoader(training_loader(task), timer)
    assert len(clocked) == len(plain) == 21
    stream, expected = iter(clocked), iter(plain)
    for _ in range(5):
        assert torch.equal(next(stream).input_ids_BL, next(expected).input_ids_BL)
    state = clocked.state_dict()
    assert state == plain.state_dict()
    stream.close()
    again = TimedLoader(training_loader(task), timer)
    again.load_state_dict(state)
    assert [b.input_ids_BL.tolist() for b in again] == [b.input_ids_BL.tolist() for b in expected]
    assert timer.data_wait_s > 0 and timer.excluded_s == 0


def test_every_row_has_its_columns(task, make_student) -> None:
    fit(make_student(), task)
    logged, measured = [], []
    for row in _rows(task.folder / "metrics.csv"):
        (measured if row["validation_loss"] else logged).append({name for name, value in row.items() if value})
    against_the_teacher = {"heldout_kl", "heldout_teacher_ce", "heldout_top1"}
    against_the_writer = {name for name in COLUMNS if name.startswith("ratio_")}
    assert logged == [set(COLUMNS) - {"validation_loss", "heldout_s"} - against_the_teacher - against_the_writer] * 3
    assert measured == [{"step", "num_tokens", "validation_loss", "heldout_s"}]
    values = [float(value) for row in _rows(task.folder / "metrics.csv") for value in row.values() if value]
    assert all(map(math.isfinite, values))


def test_memory_of_a_cpu_is_what_the_process_takes() -> None:
    page = mmap.PAGESIZE
    with mmap.mmap(-1, 64 << 20) as block:  # from the system itself: what was freed before is not in it
        before = memory_bytes(torch.device("cpu"))
        for start in range(0, len(block), page):
            block[start] = 1
        # another thread may give some back meanwhile
        assert memory_bytes(torch.device("cpu")) - before > 32 << 20


def test_micro_batches_between_two_rows_are_not_looked_at(task, make_student, monkeypatch) -> None:
    """Nothing asks the device for a number but at a row: `tolist` of the sums is called once a row and kind."""
    calls = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: calls.append(tuple(self.shape)) or original(self))

    class Counted(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
            seen.append(len([shape for shape in calls if shape in ((5,), (2,))]))

    seen: list[int] = []
    trainer = lightning.Trainer
    monkeypatch.setattr(
        lightning,
        "Trainer",
        lambda **given: trainer(**given | {"callbacks": [*given["callbacks"], Counted()]}),
    )
    fit(make_student(), task)
    # rows after steps 3, 6 and 7, of three micro-batches each
    assert seen == [0] * 8 + [2] * 9 + [4] * 3 + [6]
