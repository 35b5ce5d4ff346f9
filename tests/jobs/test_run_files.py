"""Every run file that is shipped, and every command and YAML that a document shows, is one that capgap understands."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from capgap.jobs.arguments import parse, parse_settings
from capgap.jobs.help import help_text
from capgap.jobs.reader import read_settings
from capgap.jobs.registry import COMMANDS
from capgap.pipeline.law.expand import cells
from capgap.pipeline.stages import declared
from capgap.pipeline.student.cut import pruned_config
from capgap.pipeline.student.shapes import shape_of, target_shape
from capgap.pipeline.workflow.graph import instances
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.run_file import RunFile

ROOT = Path(__file__).parents[2]
GRID_FILES = sorted((ROOT / "jobs" / "runs").glob("law-*.yaml"))
RUN_FILES = sorted({*(ROOT / "jobs" / "runs").glob("*.yaml")} - {*GRID_FILES})
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    """(document, text) of every fenced block in that language."""
    return [
        (document.name, text)
        for document in DOCUMENTS
        for found, text in FENCE.findall(document.read_text())
        if found == language
    ]


def commands() -> list[str]:
    """Every command line that a document shows, without its comment."""
    lines = [line.split(" #")[0].strip() for _, text in [*blocks("sh"), *blocks("")] for line in text.splitlines()]
    return sorted({line for line in lines if re.match(r"(make|capgap|\.venv/bin/capgap) ", line)})


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_a_shipped_run_file_parses_and_makes_what_it_names(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    run = RunFile.model_validate(values)
    made = {stage.section for stage in declared() if stage.name in {one.stage for one in instances(run)}}
    assert made == (values.keys() & {stage.section for stage in declared()}) | (
        {"train"} if "arms" in values else set()
    )


@pytest.mark.parametrize("path", GRID_FILES, ids=lambda path: path.stem)
def test_a_shipped_grid_file_parses_and_its_runs_are_run_files(path: Path) -> None:
    grid = LawGrid.model_validate(yaml.safe_load(path.read_text()))
    tokens = {student: dict.fromkeys(grid.budgets, 10_000) for student in grid.students}
    found = list(cells(grid, tokens))
    assert len(found) == len(grid.students) * (1 + len(grid.teachers)) * len(grid.seeds)
    for cell in found:
        assert RunFile.model_validate(cell.run.model_dump(mode="json")).arms == cell.run.arms


def test_the_smoke_grid_and_the_measurement_are_shipped() -> None:
    assert {path.stem for path in GRID_FILES} >= {"law-smoke", "law-cpu"}
    grid = LawGrid.model_validate(yaml.safe_load((ROOT / "jobs/runs/law-cpu.yaml").read_text()))
    assert len(grid.teachers) >= 5 and len(grid.students) >= 2 and len(grid.seeds) >= 3


def test_the_demo_the_one_gpu_run_and_the_paper_s_shape_are_shipped() -> None:
    assert {path.stem for path in RUN_FILES} >= {"demo", "one-gpu", "minima-3b"}


def test_the_paper_s_student_has_three_billion_parameters() -> None:
    run = RunFile.model_validate(yaml.safe_load((ROOT / "jobs/runs/minima-3b.yaml").read_text()))
    prune, more = run.student.prune, run.corpus.extend_vocabulary
    assert prune is not None and more is not None and run.teacher.adapt is not None
    # Llama-2-7b, whose configuration is that of LlamaConfig, and the paper's vocabulary
    teacher = LlamaConfig(vocab_size=32000 + more.num_pieces)
    assert teacher.vocab_size == 49216
    target = target_shape(shape_of(teacher, "the teacher"), prune)
    assert (target.num_layers, target.hidden_size, target.num_heads, target.intermediate_size) == (24, 3072, 24, 8192)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(pruned_config(teacher, target, list(range(4, 28))))
    # MiniMA-3B is published with 3.02B parameters
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(3.02e9, rel=0.01)


@pytest.mark.parametrize("line", commands())
def test_a_command_in_the_documents_is_one_that_exists(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in words[1:] if "=" not in word and not word.startswith("-")} <= targets
        return
    if words[1:] == ["--help"]:
        return
    name = " ".join(words[1:3]) if words[1] == "law" else words[1]
    assert name in COMMANDS
    parser, arguments = COMMANDS[name].parser(), words[len(name.split()) + 1 :]
    if "--help" in arguments:
        topic = arguments[arguments.index("--help") + 1 :]
        assert help_text(parser, topic[0] if topic else None)
        return
    # documents show RUN.yaml where the reader's own file goes
    given = [str(ROOT / "jobs/runs/demo.yaml") if word == "RUN.yaml" else word for word in arguments]
    given = [str(ROOT / word) if word.startswith("jobs/") else word for word in given]
    if parser.record is None:
        parse(parser, given)
    else:
        parse_settings(parser, given, parser.record)


@pytest.mark.parametrize("document, text", blocks("yaml"))
def test_a_yaml_in_the_documents_fits_the_run_file(document: str, text: str, tmp_path: Path) -> None:
    demo = yaml.safe_load((ROOT / "jobs/runs/demo.yaml").read_text())
    shown = yaml.safe_load(text)
    if "teachers" in shown:
        LawGrid.model_validate(shown)
        return
    if "inits" in shown:  # a part of a grid
        LawGrid.model_validate({**yaml.safe_load((ROOT / "jobs/runs/law-smoke.yaml").read_text()), **shown})
        return
    RunFile.model_validate({**demo, **shown})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**demo, **shown}))
    read_settings(RunFile, tmp_path / "run.yaml")
