"""The stage over lm-eval itself, on a tiny model and tasks whose data lie beside them: nothing is downloaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from capgap.pipeline.benchmark import stage
from capgap.pipeline.benchmark.measure import measure
from capgap.pipeline.stage.versions import versions_of
from capgap.schemas.benchmark import BenchmarkResults
from capgap.schemas.errors import InputError, SettingError

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

TASKS = Path(__file__).parents[2] / "assets" / "benchmarks"

# with seven examples a prompt has 36 tokens of the 64 that the model takes
ALL = {"animals": {"num_fewshot": 7}, "animals_written": {}, "pairs": {}}

# Probabilities of float32 models whose sums run in another order; measured: 2e-8.
TOLERANCE_BRIER = 1e-5


def results(context) -> BenchmarkResults:
    return BenchmarkResults.model_validate_json((context.folder / "benchmark.json").read_bytes())


def values(found: BenchmarkResults) -> dict[tuple[str, str], float]:
    return {(row.task, row.metric): row.value for row in found.rows}


@pytest.fixture
def through_transformers(make_context) -> BenchmarkResults:
    context = make_context("hf", tasks=ALL)
    stage.run(context)
    return results(context)


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's build for GPUs does not run on a CPU")
def test_both_backends_give_equal_scores(make_context, through_transformers) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    context = make_context("vllm", tasks=ALL, backend="vllm")
    stage.run(context)
    found = results(context)
    assert (found.backend, through_transformers.backend) == ("vllm", "hf")
    assert found.dtype == through_transformers.dtype == "float32"
    one, other = values(found), values(through_transformers)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value == pytest.approx(other[key], abs=TOLERANCE_BRIER if key[1] == "brier_score" else 0), key
    # neither sure of everything nor clueless, or equality would say nothing
    assert 0.25 < one["animals", "acc"] < 1 and 0 < one["animals_written", "exact_match"] < 1


def test_rows_say_what_was_asked_how_and_of_how_many(through_transformers) -> None:
    found = through_transformers
    assert (found.model, found.limit, found.context_tokens) == ("train/distilled/seed-0", None, 64)
    assert found.versions["lm-eval"]
    by_task = {row.task: row for row in found.main}
    assert list(by_task) == list(ALL)
    animals = by_task["animals"]
    assert (animals.metric, animals.num_fewshot, animals.num_samples, animals.version) == ("acc", 7, 14, "1.0")
    # of 14 answers, with one degree of freedom less
    assert animals.stderr == pytest.approx((animals.value * (1 - animals.value) / 13) ** 0.5)
    assert [by_task[task].chance for task in ALL] == [0.25, None, 0.5]
    assert by_task["animals_written"].filter == "first_word"


def test_a_group_stands_for_its_tasks_and_keeps_their_rows(make_context) -> None:
    context = make_context(tasks={"animals_both": {}}, limit=6)
    stage.run(context)
    found = results(context)
    (both,) = found.main
    parts = [row for row in found.rows if row.metric == "acc" and row.task != "animals_both"]
    assert [row.task for row in parts] == ["animals", "pairs"] and not any(row.main for row in parts)
    assert both.value == pytest.approx(sum(row.value for row in parts) / 2)
    assert both.chance == pytest.approx((0.25 + 0.5) / 2)
    assert (found.limit, both.num_samples, both.num_all_samples) == (6, 12, 28)


def test_another_metric_may_stand_for_a_task(make_context) -> None:
    context = make_context(tasks={"pairs": {"metric": "brier_score"}}, limit=2)
    stage.run(context)
    assert [row.metric for row in results(context).rows] == ["brier_score", "acc"]
    context = make_context("other", tasks={"pairs": {"metric": "f1"}}, limit=2)
    with pytest.raises(SettingError, match=r"tasks\.pairs\.metric: .* found f1, expected one of acc,none or brier"):
        stage.run(context)


def test_a_stage_that_was_killed_goes_on_with_the_next_task(make_context, through_transformers, monkeypatch) -> None:
    asked: list[str] = []

    def until_killed(lm, loaded, one, settings):
        asked.append(one.task)
        if asked == ["animals", "animals_written"]:
            raise KeyboardInterrupt
        return measure(lm, loaded, one, settings)

    monkeypatch.setattr(stage, "measure", until_killed)
    context = make_context("killed", tasks=ALL)
    with pytest.raises(KeyboardInterrupt):
        stage.run(context)
    assert not (context.folder / "benchmark.json").exists()
    assert json.loads((context.folder / "work" / "plan.json").read_text())["total"] == 3
    stage.run(context)
    assert asked == ["animals", "animals_written", "animals_written", "pairs"]
    assert results(context) == through_transformers


def test_a_task_that_a_killed_stage_measured_otherwise_says_so(make_context, monkeypatch) -> None:
    context = make_context(tasks={"animals": {}, "pairs": {}}, limit=2)

    def until_killed(lm, loaded, one, settings):
        if one.task == "pairs":
            raise KeyboardInterrupt
        return measure(lm, loaded, one, settings)

    with monkeypatch.context() as older:
        older.setattr(stage, "measure", until_killed)
        older.setattr(stage, "versions_of", lambda names: {"lm-eval": "0.4.1"})
        with pytest.raises(KeyboardInterrupt):
            stage.run(context)
    stage.run(context)
    found = results(context)
    assert found.versions["lm-eval"] == versions_of(["lm-eval"])["lm-eval"] and found.backend == "hf"
    assert list(found.earlier) == ["animals"]
    assert found.earlier["animals"].versions == {"lm-eval": "0.4.1"}
    assert found.earlier["animals"].backend == "hf" and found.earlier["animals"].context_tokens == 64


def test_lm_eval_is_silent_off_a_terminal(make_context, capfd) -> None:
    stage.run(make_context(tasks={"pairs": {}}, limit=2))
    said = capfd.readouterr().err.splitlines()
    # the stage's own line, where an earlier test has set up logs
    assert [line for line in said if not line.startswith("pairs: acc")] == []


def test_more_examples_than_there_are_is_said_in_one_line(make_context) -> None:
    context = make_context(tasks={"animals": {"num_fewshot": 40}}, limit=2)
    with pytest.raises(InputError, match=r"benchmarks\.tasks\.animals: the task animals cannot be measured; found \w+"):
        stage.run(context)


def test_a_task_without_a_number_is_named_and_a_number_of_numpy_is_one(make_context, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    shutil.copytree(TASKS, folder)
    (folder / "mine.py").write_text(
        "import numpy\n\ndef nothing(doc, results):\n    return {}\n\n"
        "def half(doc, results):\n    return {'acc': 1}\n\ndef mean(values):\n    return numpy.float32(0.5)\n"
    )
    (folder / "silent.yaml").write_text("include: pairs.yaml\ntask: silent\nprocess_results: !function mine.nothing\n")
    (folder / "half.yaml").write_text(
        "include: pairs.yaml\ntask: half\nprocess_results: !function mine.half\n"
        "metric_list: [{metric: acc, aggregation: !function mine.mean, higher_is_better: true}]\n"
    )
    asked = {"limit": 2, "include_path": str(folder), "trust_task_code": True}
    with pytest.raises(InputError, match=r"^benchmarks\.tasks\.silent: the task silent reports no number; expected"):
        stage.run(make_context("silent", tasks={"silent": {}}, **asked))
    context = make_context("half", tasks={"half": {}}, **asked)
    stage.run(context)
    assert [row.value for row in results(context).rows] == [0.5]


def test_data_that_are_not_there_name_the_task_before_the_model_is_loaded(make_context, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: a\ndoc_to_choice: [b]\ndoc_to_target: 0\n"
    )
    context = make_context(tasks={"lost": {}}, include_path=str(folder))
    context.inputs.clear()
    with pytest.raises(InputError, match=r"tasks\.lost: the task lost cannot be loaded; found FileNotFound.*nowhere"):
        stage.run(context)


def test_code_of_models_runs_only_where_it_is_allowed(make_context, monkeypatch) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    stage.run(make_context(tasks={"pairs": {}}, limit=1))
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


def test_a_chat_template_is_used_where_it_is_asked_for_and_there_is_one(make_context, model_folder, tmp_path) -> None:
    asked = {"tasks": {"pairs": {"metric": "brier_score"}}, "limit": 4}
    stage.run(make_context("plain", **asked))
    with pytest.raises(InputError, match=r"task pairs cannot be measured; found ValueError: .*chat.template"):
        stage.run(make_context("none", apply_chat_template=True, **asked))
    chat = make_context("chat", apply_chat_template=True, **asked)
    folder = Path(shutil.copytree(model_folder, tmp_path / "chat-model"))
    (folder / "chat_template.jinja").write_text("Q : {{ messages[0].content }}\nA :")
    (made,) = chat.inputs.values()
    made.manifest.facts["path"] = str(folder)
    stage.run(chat)
    plain, templated = (results(make_context(name, **asked)).rows[0].value for name in ("plain", "chat"))
    # the same question, behind other words
    assert templated != plain
