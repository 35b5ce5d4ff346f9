"""A finished cache is enough: student, training, evaluation and report where neither corpus nor teacher ever were."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_runs import NEEDED, SEQ_LEN, TRAIN

from capgap.pipeline.eval import stage as eval_stage
from capgap.pipeline.report import stage as report_stage
from capgap.pipeline.report.summary import Report
from capgap.pipeline.stage.context import Instance, StageContext, StageInput
from capgap.pipeline.stage.folder import content_files
from capgap.pipeline.stage.identity import content_of
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.student import stage as student_stage
from capgap.pipeline.train import stage as train_stage
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import InputError, MismatchError, SettingError
from capgap.schemas.manifest import InputEntry, Manifest
from capgap.schemas.results import RESULTS_NAME, EvalResults
from capgap.schemas.run_file import RunFile

STUDENT, OTHER = NEEDED[3], Instance("train", "cross_entropy", 1)
NOWHERE = "/nowhere/at/all"

Inputs = dict[str, StageInput]


@dataclasses.dataclass(frozen=True)
class Machine:
    """A folder where stages run one after the other, each handed what is named."""

    run: RunFile
    inputs: Inputs

    def make(self, module: ModuleType, instance: Instance, *names: str) -> Manifest:
        """Run a stage on these inputs, and keep what it made as one."""
        context = self.context(instance, *names)
        result = module.run(context)
        files = content_files(context.folder)
        made = Manifest(
            stage=instance.stage,
            instance=instance.name,
            settings={},
            inputs={name: _entry(made) for name, made in context.inputs.items()},
            identity="0" * 64,
            content=content_of(files),
            files=files,
            shard_sets=result.shard_sets,
            facts=result.facts,
            totals=result.totals,
            versions={},
            started="2026-01-01T00:00:00Z",
            wall_s=1.0,
            command=(),
        )
        self.inputs[instance.name] = StageInput(context.folder, made)
        return made

    def context(self, instance: Instance, *names: str) -> StageContext:
        folder = Path(self.run.out) / instance.name
        (folder / "work").mkdir(parents=True)
        return StageContext(self.run, instance, folder, {name: self.inputs[name] for name in names}, "cpu")


def _entry(made: StageInput) -> InputEntry:
    return InputEntry(path=str(made.location), identity=made.manifest.identity, content=made.manifest.content)


def _elsewhere(manifest: Manifest) -> Manifest:
    """The manifest, as read on a machine where nothing that it names is."""
    inputs = {name: entry.model_copy(update={"path": NOWHERE}) for name, entry in manifest.inputs.items()}
    resolved = json.loads(json.dumps(manifest.resolved).replace(manifest.resolved["out"], NOWHERE))
    resolved["teacher"]["path"] = NOWHERE
    return manifest.model_copy(update={"inputs": inputs, "resolved": resolved})


def _machine(given: Mapping[str, Any], out: Path, location: Path | str, manifest: Manifest, **more: Any) -> Machine:
    settings = {**given, "out": str(out), "teacher": {"path": NOWHERE}, "corpus": {}, **more}
    return Machine(RunFile.model_validate(settings), {"cache": StageInput(location, _elsewhere(manifest))})


def _weights(manifest: Manifest) -> dict[str, str]:
    return {file.path: file.sha256 for file in manifest.files if file.path.endswith(".safetensors")}


@pytest.fixture(params=["local", "http"])
def alone(request, made, tmp_path: Path, monkeypatch, serve: Callable[[Path], str]) -> Machine:
    """A machine that has a copy of the cache, or its URL, and nothing else."""
    monkeypatch.setenv("CAPGAP_DOWNLOADS", str(tmp_path / "downloads"))
    copy = tmp_path / "there"
    shutil.copytree(Path(made["number"]["out"]) / "cache", copy)
    manifest = read_manifest(copy)
    assert manifest is not None
    return _machine(made["number"], tmp_path / "out", copy if request.param == "local" else serve(copy), manifest)


def test_the_whole_way_from_a_cache_ends_in_the_same_student_and_a_report(made, alone: Machine, caplog) -> None:
    given = RunFile.model_validate(made["number"])
    with caplog.at_level(logging.WARNING):
        fresh = alone.make(student_stage, STUDENT, "cache")
        trained = [alone.make(train_stage, one, "cache", STUDENT.name) for one in (TRAIN, OTHER)]
        alone.make(eval_stage, Instance("eval"), "cache", TRAIN.name, OTHER.name)
        alone.make(report_stage, Instance("report"), "cache", STUDENT.name, TRAIN.name, OTHER.name, "eval")
    assert not [record for record in caplog.records if record.name == "capgap"], "nothing is amiss"
    there = [carry_out(given, one) for one in (STUDENT, TRAIN, OTHER)]
    assert [_weights(one) for one in (fresh, *trained)] == [_weights(one) for one in there]
    assert fresh.facts == there[0].facts
    totals = {name: value for name, value in trained[0].totals.items() if not name.startswith("first_")}
    assert totals.items() <= there[1].totals.items()

    folder = Path(alone.run.out)
    results = EvalResults.model_validate_json((folder / "eval" / RESULTS_NAME).read_bytes())
    assert results.teacher is None and "a finished cache stands for it" in str(results.teacher_missing)
    assert [model.name for model in results.models] == [TRAIN.name, OTHER.name]
    for model in results.models:
        assert model.against_cache is not None and model.against_cache.loss == model.loss
        assert model.ece is not None and 0 < model.ece < 1 and model.bits_per_byte > 0
    assert results.cached is not None and results.cached.num_sequences == results.num_sequences
    assert all(sample.continuations.keys() == {TRAIN.name, OTHER.name} for sample in results.samples)
    assert len(results.samples) == alone.run.eval.num_text_samples

    report = Report.model_validate_json((folder / "report" / "report.json").read_bytes())
    assert [stage.instance for stage in report.stages] == ["cache", STUDENT.name, TRAIN.name, OTHER.name, "eval"]
    assert report.fidelity is not None and report.cache.num_tokens > 0
    assert all(model.flops is not None for model in report.frontier.models), "the cache says how large its teacher is"
    assert {curve.name for curve in report.curves} == {TRAIN.name, OTHER.name}
    assert (folder / "report" / "report.html").is_file()


def test_the_cache_s_held_out_sequences_measure_as_the_corpus_does(made, alone: Machine) -> None:
    """Where it holds all of the corpus's."""
    given = RunFile.model_validate(made["number"])
    known = {one.name: _input(given, one) for one in (*NEEDED, TRAIN) if carry_out(given, one)}
    manifests = known["corpus"].manifest.shard_sets["heldout"], known["cache"].manifest.shard_sets["heldout-sampled"]
    assert manifests[0].num_sequences == manifests[1].num_sequences
    alone.inputs[TRAIN.name] = known[TRAIN.name]
    alone.make(eval_stage, Instance("eval"), "cache", TRAIN.name)
    context = alone.context(Instance("eval", "with corpus"), "cache", TRAIN.name)
    eval_stage.run(dataclasses.replace(context, inputs={"corpus": known["corpus"], **context.inputs}))
    here, there = (
        EvalResults.model_validate_json((Path(alone.run.out) / "eval" / at / RESULTS_NAME).read_bytes())
        for at in ("", "with corpus")
    )
    assert here == there, "in one pass over the same sequences, or in two"


def test_a_student_made_elsewhere_meets_the_cache_s_tokenizer(made, alone: Machine) -> None:
    alone.inputs[STUDENT.name] = _input(RunFile.model_validate(made["square"]), STUDENT)
    with pytest.raises(MismatchError, match="cache and student have different tokenizers"):
        alone.make(train_stage, TRAIN, "cache", STUDENT.name)
    other = {"student": {"path": str(alone.inputs[STUDENT.name].path / "model")}}
    run = RunFile.model_validate({**alone.run.model_dump(), **other})
    with pytest.raises(MismatchError, match="its tokenizer differs from that of the cache"):
        dataclasses.replace(alone, run=run).make(student_stage, STUDENT, "cache")


@pytest.fixture(scope="module")
def bare(made, tmp_path_factory) -> tuple[Path, Manifest]:
    """A cache without held-out sequences."""
    out = tmp_path_factory.mktemp("bare")
    reuse = {stage: f"{made['number']['out']}/{stage}" for stage in ("corpus", "teacher")}
    cache = made["number"]["cache"] | {"num_heldout_sequences": 0}
    run = RunFile.model_validate(made["number"] | {"out": str(out), "reuse": reuse, "cache": cache})
    return out / "cache", carry_out(run, Instance("cache"))


def test_a_cache_without_held_out_sequences_is_not_enough_and_says_so_before_any_work(made, bare, tmp_path) -> None:
    machine = _machine(made["number"], tmp_path, *bare)
    machine.make(student_stage, STUDENT, "cache")
    message = r"no held-out sequences .*and the run has no corpus; .* name the corpus .* cache.num_heldout_sequences"
    with pytest.raises(InputError, match=message):
        train_stage.check(machine.run, TRAIN, machine.inputs)
    with pytest.raises(InputError, match=message):
        eval_stage.check(machine.run, Instance("eval"), machine.inputs)
    corpus = _input(RunFile.model_validate(made["number"]), Instance("corpus"))
    train_stage.check(machine.run, TRAIN, machine.inputs | {"corpus": corpus})
    eval_stage.check(machine.run, Instance("eval"), machine.inputs | {"corpus": corpus})


def test_what_needs_the_teacher_itself_is_refused_by_its_setting(made, bare, tmp_path) -> None:
    pruned = {"student": {"prune": {"hidden_size": 16}}}
    machine = _machine(made["number"], tmp_path, *bare, **pruned)
    with pytest.raises(SettingError, match=r"student\.prune: a student that is pruned from the teacher needs the teac"):
        student_stage.check(machine.run, STUDENT, machine.inputs)
    for settings, where in (({"teacher": "live"}, "eval.teacher"), ({"speculative": {}}, "eval.speculative")):
        asked = _machine(made["number"], tmp_path, *bare, eval=settings)
        with pytest.raises(SettingError, match=f"{where}: .*this run has none"):
            eval_stage.check(asked.run, Instance("eval"), asked.inputs)


def test_a_teacher_that_is_to_be_asked_online_must_be_there(made, alone: Machine) -> None:
    alone.make(student_stage, STUDENT, "cache")
    train = {"train": {"targets": "online", "max_tokens": 2 * 4 * SEQ_LEN}, "arms": {"distilled": {}}}
    asked = RunFile.model_validate({**alone.run.model_dump(), **train})
    with pytest.raises(SettingError, match=r"train\.targets: the teacher is to be asked online, and this run has none"):
        train_stage.check(asked, TRAIN, alone.inputs)


def _input(run: RunFile, instance: Instance) -> StageInput:
    folder = Path(run.out) / instance.name
    manifest = read_manifest(folder)
    assert manifest is not None
    return StageInput(folder, manifest)
