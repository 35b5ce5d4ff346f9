"""A stage is its folder, and one line that lists it: a toy is added so, and all that knows stages knows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from capgap.pipeline import stages
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.stages import declared, run_file_type, stage_named
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.driver import walk
from capgap.pipeline.workflow.graph import downstream, input_names, instances
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.run_file import RunFile

DECLARATION = '''
"""Writes down how many sequences the corpus has, in rounds: each reads what the round before it made."""

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.declaration import Stage
from capgap.schemas.base import Record


class ToySettings(Record):
    """How a toy counts."""

    num_rounds: int = 2
    """Rounds."""

    factor: int = 1
    """Every count is multiplied by this."""


def rounds(run):
    return [Instance("toy", arm=f"round-{i}") for i in range(run.toy.num_rounds)] if run.makes("toy") else []


def inputs(run, instance):
    number = int(instance.arm.removeprefix("round-"))
    return ["corpus"] if number == 0 else ["corpus", f"toy/round-{number - 1}"]


STAGE = Stage(
    name="toy",
    help="count sequences",
    code="toy_stage.stage",
    section="toy",
    settings_type=ToySettings,
    instances=rounds,
    inputs=inputs,
    settings=lambda run, instance: {"toy": {"factor": run.toy.factor}},
)
'''

WORK = """
from capgap.pipeline.stage.context import StageResult


def run(context):
    corpus = context.input("corpus").manifest
    count = context.run.toy.factor * sum(part.num_sequences for part in corpus.shard_sets.values())
    before = [name for name in context.inputs if name.startswith("toy/")]
    total = count + sum(context.input(name).manifest.totals["total"] for name in before)
    (context.folder / "count.txt").write_text(f"{total}\\n")
    return StageResult(totals={"total": total})
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's folder, where Python finds it, and its one line."""
    folder = tmp_path / "code" / "toy_stage"
    folder.mkdir(parents=True)
    for name, text in (("__init__", ""), ("declaration", DECLARATION), ("stage", WORK)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(stages, "FOLDERS", (*stages.FOLDERS, "toy_stage"))


def _made_here(run: RunFile) -> Callable[..., int]:
    def start(arguments) -> int:
        name = arguments[arguments.index("--instance") + 1]
        carry_out(run, next(one for one in instances(run) if one.name == name), remake="--force" in arguments)
        return 0

    return start


def test_a_toy_stage_is_made_known_and_current(toy, make_corpus_run) -> None:
    plain = make_corpus_run()
    settings = {"name": "tried", "out": plain.out, "corpus": plain.corpus.model_dump(), "toy": {"factor": 3}}
    run = run_file_type().model_validate(settings)
    assert [instance.name for instance in instances(run)] == ["corpus", "toy/round-0", "toy/round-1"]
    made = walk(run, instances(run), log=lambda name, why: None, start=_made_here(run))
    assert made == ["corpus", "toy/round-0", "toy/round-1"]
    assert {state.state for state in states(run).values()} == {State.CURRENT}
    totals = [read_manifest(Path(run.out) / name).totals["total"] for name in made[1:]]  # type: ignore[union-attr]
    assert totals[1] == 2 * totals[0] and totals[0] % 3 == 0
    other = run_file_type().model_validate(settings | {"toy": {"factor": 4}})
    assert states(other)["toy/round-0"].why == "toy.factor was 3, is 4"
    assert states(other)["corpus"].state is State.CURRENT


def test_an_instance_may_depend_on_an_earlier_one_of_its_own_stage(toy, make_corpus_run) -> None:
    values = {"name": "tried", "out": "runs/tried", "corpus": {}, "toy": {"num_rounds": 3}}
    run = run_file_type().model_validate(values)
    assert input_names(run, Instance("toy", arm="round-2")) == ["corpus", "toy/round-1"]
    assert [one.name for one in downstream(run, "toy/round-1")] == ["toy/round-1", "toy/round-2"]


def test_every_stage_says_what_it_does_and_lies_in_a_folder_of_its_name() -> None:
    assert [stage.code for stage in declared()] == [f"capgap.pipeline.{stage.name}.stage" for stage in declared()]
    assert all(stage.help and stage.help[0].islower() and not stage.help.endswith(".") for stage in declared())
    assert all(stage.section in RunFile.model_fields for stage in declared())
    assert stage_named("cache").name == "cache"
