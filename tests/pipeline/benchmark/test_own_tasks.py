"""Own tasks are data, unless their code is trusted."""

from __future__ import annotations

from pathlib import Path

import pytest

from capgap.pipeline.benchmark import stage
from capgap.pipeline.benchmark.own_tasks import require_plain_tasks, task_files
from capgap.pipeline.benchmark.tasks import check_tasks
from capgap.schemas.errors import InputError
from capgap.schemas.run_benchmark import BenchmarkSettings

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

TASKS = Path(__file__).parents[2] / "assets" / "benchmarks"
PLAIN = "task: mine\ndataset_path: json\nmetric_list: [{metric: acc}]\n"


def test_plain_tasks_are_taken() -> None:
    require_plain_tasks(TASKS)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (PLAIN + "process_docs: !function utils.process\n", "!function"),
        (PLAIN + "filter_list: [{name: a, filter: [{function: custom, filter_fn: !function u.f}]}]\n", "!function"),
        (PLAIN.replace("json", "pandas"), "dataset_path: pandas"),
        (PLAIN.replace("json", "someone/data"), "dataset_path: someone/data"),
        (PLAIN.replace("acc", "someones_metric"), "metric: someones_metric"),
        (PLAIN.replace("metric: acc", "metric: acc, hf_evaluate: true"), "hf_evaluate: True"),
        ("group: all\ntask: [{task: mine, dataset_path: pandas}]\n", "dataset_path: pandas"),
        ("include: more_yaml\ntask: mine\n", "!function"),
        ("include: [more_yaml]\ntask: mine\n", "!function"),
        ("task: mine\nclass: mine.Task\n", "class: mine.Task"),
        ("task: mine\nuse_prompt: promptsource:a\n", "use_prompt"),
    ],
)
def test_each_way_to_code_is_refused_and_named(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "more_yaml").write_text("custom_dataset: !function utils.make\n")
    with pytest.raises(InputError, match=rf"this task runs code, .*found {found}.*benchmarks\.trust_task_code"):
        require_plain_tasks(tmp_path)


def test_what_is_no_yaml_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: [\n")
    with pytest.raises(InputError, match=r"mine\.yaml: the task cannot be read"):
        require_plain_tasks(tmp_path)


TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() | length }} {{animal}}"


def _reaching(tmp_path: Path) -> str:
    for path in TASKS.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "reaching.yaml").write_text(f'include: pairs.yaml\ntask: reaching\ndoc_to_text: "{TEMPLATE}"\n')
    return str(tmp_path)


def test_a_template_does_not_reach_python_unless_the_task_is_trusted(make_context, tmp_path: Path) -> None:
    settings = {"tasks": {"reaching": {}}, "limit": 1, "include_path": _reaching(tmp_path)}
    with pytest.raises(InputError, match=r"SecurityError: access to attribute '__class__'"):
        stage.run(make_context(**settings))
    stage.run(make_context("trusted", trust_task_code=True, **settings))


def test_trusted_code_runs(make_context, tmp_path: Path) -> None:
    folder = _reaching(tmp_path)
    (tmp_path / "mine.py").write_text("def question(doc):\n    return 'after ' + doc['animal'] + ' comes'\n")
    (tmp_path / "coded.yaml").write_text("include: pairs.yaml\ntask: coded\ndoc_to_text: !function mine.question\n")
    settings = {"tasks": {"coded": {}}, "limit": 2, "include_path": folder}
    with pytest.raises(InputError, match=r"coded\.yaml: this task runs code"):
        check_tasks(BenchmarkSettings.model_validate(settings))
    stage.run(make_context(trust_task_code=True, **settings))


def test_every_file_of_a_task_is_a_source_and_caches_are_none(tmp_path: Path) -> None:
    for name in ("a.yaml", "data/b.jsonl", "__pycache__/c.pyc", ".git/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert task_files(tmp_path) == [tmp_path / "a.yaml", tmp_path / "data" / "b.jsonl"]
