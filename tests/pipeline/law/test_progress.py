"""How often a grid's folders are read, and what its progress makes of them."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.law.expand import Cell, cell, cells, corpus_run, teacher_run
from capgap.pipeline.law.plan import plan_grid
from capgap.pipeline.law.progress import GridProgress
from capgap.pipeline.law.run import gather
from capgap.pipeline.plan import Stated
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.manifests import each_manifest_once, read_manifest
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import MismatchError
from capgap.schemas.law_grid import LawGrid, LawReuse
from capgap.schemas.manifest import MANIFEST_NAME, Manifest

SHAPE = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
TOKENS = {"s": {"short": 320}}

_opened: list[Counter[str]] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened and str(arguments[0]).endswith(f"/{MANIFEST_NAME}"):
        _opened[-1][os.fspath(arguments[0])] += 1


@pytest.fixture(scope="session", autouse=True)
def _audited() -> None:
    sys.addaudithook(_note)


@contextmanager
def opened() -> Iterator[Counter[str]]:
    """How often each manifest was opened."""
    _opened.append(Counter())
    try:
        yield _opened[-1]
    finally:
        _opened.pop()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> LawGrid:
    """A grid of two teachers, with its corpus, teachers and caches made."""
    folder = tmp_path_factory.mktemp("grid")
    chance = random.Random(3)
    (folder / "texts").mkdir()
    for number in range(40):
        words = ("".join(chance.choices("abcdefgh", k=5)) for _ in range(200))
        (folder / "texts" / f"{number}.txt").write_text(" ".join(words))
    grid = LawGrid.model_validate(
        {
            "name": "g",
            "out": str(folder / "law"),
            "device": "cpu",
            "seeds": [0],
            "corpus": {
                "sources": [str(folder / "texts")],
                "vocab_size": 300,
                "seq_len": 32,
                "shard_sequences": 10,
                "teacher_fraction": 0.3,
                "heldout_fraction": 0.2,
            },
            "teachers": {"a": {"model": SHAPE}, "b": {"model": {**SHAPE, "intermediate_size": 48}}},
            "teacher_training": {"batch_sequences": 4, "max_tokens": 256, "loggers": []},
            "cache": {"engine": "transformers", "num_samples": 4, "num_heldout_sequences": 0, "max_tokens": 640},
            "students": {"s": {"model": SHAPE}},
            "train": {"batch_sequences": 4, "loggers": []},
            "budgets": {"short": {"tokens": 320}},
        }
    )
    carry_out(corpus_run(grid), Instance("corpus"))
    for teacher in grid.teachers:
        for stage in ("teacher", "cache"):
            carry_out(teacher_run(grid, teacher), Instance(stage))  # type: ignore[arg-type]
    return grid


@pytest.fixture
def make_grid(made: LawGrid, tmp_path: Path) -> Callable[[int], LawGrid]:
    """That grid, with as many seeds as asked for, in a folder of the test's own."""
    out = tmp_path / "law"
    shutil.copytree(made.out, out)
    return lambda num_seeds: made.model_copy(update={"out": str(out), "seeds": tuple(range(num_seeds))})


@pytest.fixture
def train(make_finished: Callable[..., Manifest]) -> Callable[[Cell], None]:
    """Finish a cell's student and trainings, without a model."""

    def finish(one: Cell) -> None:
        for instance in (Instance("student", seed=one.seed), *map(one.trained, one.arms)):
            make_finished(one.run, instance.name)

    return finish


def test_a_command_opens_each_manifest_once_however_many_runs_share_it(
    make_grid: Callable[[int], LawGrid], train: Callable[[Cell], None]
) -> None:
    totals: dict[str, list[int]] = {"table": [], "plan": []}
    for num_seeds in (1, 2, 3):
        grid = make_grid(num_seeds)
        for one in cells(grid, TOKENS):
            if one.seed == num_seeds - 1:
                train(one)
        for name, look in (
            ("table", lambda: gather(grid)),  # noqa: B023
            ("plan", lambda: plan_grid(grid, Stated(), num_workers=1)),  # noqa: B023
        ):
            with opened() as counted:
                look()
            assert set(counted.values()) == {1}, f"{name}: {counted.most_common(3)}"
            totals[name].append(counted.total())
    # corpus, and teacher and cache of both teachers, then student and training of three cells a seed
    assert totals["table"] == totals["plan"] == [1 + 2 * 2 + 3 * 2 * num_seeds for num_seeds in (1, 2, 3)]


def test_after_a_job_only_what_its_cell_reads_is_opened(
    make_grid: Callable[[int], LawGrid], train: Callable[[Cell], None]
) -> None:
    seen = []
    for num_seeds in (1, 3):
        progress = GridProgress(make_grid(num_seeds))
        (job,) = (one for one in progress.cell_jobs() if one.name == "students/s/b/seed-0")
        train(cell(make_grid(num_seeds), "s", "b", 0, TOKENS["s"]))
        with opened() as counted:
            progress.ended_well(job)
            progress.write()
        seen.append(sorted(Path(path).parent.name for path in counted.elements()))
    # it reads the corpus, its teacher and its cache; student and training are its own
    assert seen[0] == seen[1] == ["cache", "corpus", "seed-0", "seed-0", "teacher"]


def test_a_supervised_cell_stays_with_the_cache_whose_text_it_has_read(
    make_grid: Callable[[int], LawGrid], train: Callable[[Cell], None]
) -> None:
    grid = make_grid(2)
    train(cell(grid, "s", None, 0, TOKENS["s"], reads="b"))
    jobs = {job.name: job for job in GridProgress(grid).cell_jobs()}
    begun, other = (jobs[f"students/s/supervised/seed-{seed}"] for seed in (0, 1))
    assert begun.needs == ("teachers/b",) and str(begun.run.reuse["cache"]).endswith("teachers/b/cache")
    assert other.needs == ("teachers/a",)


def test_a_reused_cache_of_another_length_is_refused_before_anything_is_trained(
    make_grid: Callable[[int], LawGrid],
) -> None:
    grid = make_grid(1)
    there = {stage: {"b": f"{grid.out}/teachers/b/{stage.removesuffix('s')}"} for stage in ("teachers", "caches")}
    reusing = grid.model_copy(update={"reuse": LawReuse(**there)})
    assert GridProgress(reusing).cell_jobs()
    # shards of 10 sequences of 32 tokens: the caches were made with 640 tokens, two shards
    for max_tokens, expected in ((320, 320), (700, 960)):
        other = reusing.model_copy(update={"cache": grid.cache.model_copy(update={"max_tokens": max_tokens})})
        with pytest.raises(MismatchError, match=f"reuse.caches.b: .*found 640 tokens, expected {expected},"):
            GridProgress(other)


def test_a_plan_counts_no_training_that_is_finished_in_a_cell_that_is_not(
    make_grid: Callable[[int], LawGrid], train: Callable[[Cell], None]
) -> None:
    grid = make_grid(2)
    train(cell(grid, "s", "b", 0, TOKENS["s"]))
    plan = plan_grid(grid, Stated(), num_workers=1)
    left = {phase.phase: (phase.num_left, phase.num_runs) for phase in plan.phases}
    # of each seed, the student alone and from two teachers; one is trained and not measured
    assert left["students"] == (5, 6) and left["measurements"] == (6, 6)
    assert plan.num_processes == 2 * 3 * 3 - 2
    assert next(phase for phase in plan.phases if phase.phase == "students").tokens.value == 5 * 320


def test_a_manifest_that_is_written_while_others_look_is_seen_by_the_next_look(
    make_grid: Callable[[int], LawGrid],
) -> None:
    folder = Path(make_grid(1).out) / "corpus"
    with each_manifest_once():
        before = read_manifest(folder)
        (folder / MANIFEST_NAME).unlink()
        with each_manifest_once():
            assert read_manifest(folder) == before, "an inner look knows what the outer one has read"
    assert before is not None and read_manifest(folder) is None
