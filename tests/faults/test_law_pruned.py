"""A grid with students of both inits through the command line: what it makes, and what its rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import Zygote

from capgap.pipeline.law.grid import curves
from capgap.pipeline.law.table import read_table
from capgap.pipeline.stage.manifests import read_manifest
from capgap.schemas.law import LawRun

pytestmark = pytest.mark.slow

STUDENT = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}
TEACHERS = {
    "deep": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 32},
    "wide": {"hidden_size": 48, "num_layers": 1, "num_heads": 3, "intermediate_size": 32},
}
SEED = 5


@pytest.fixture(scope="module")
def grid_file(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers that are trained, one student of both inits, one seed: seven runs."""
    grid = {
        "name": "cuts",
        "out": "nowhere",
        "device": "cpu",
        "seeds": [SEED],
        "corpus": {**settings["corpus"], "teacher_fraction": 0.3},
        "teachers": {name: {"model": shape} for name, shape in TEACHERS.items()},
        "teacher_training": {"batch_sequences": 4, "max_tokens": 1000, "loggers": []},
        "cache": {**settings["cache"], "num_heldout_sequences": 0},
        "students": {"s": {"model": STUDENT}},
        "inits": ["common", "pruned"],
        "prune": {"num_sequences": 8},
        "train": {"batch_sequences": 4, "loggers": []},
        "budgets": {"short": {"tokens": 640}},
        "eval": settings["eval"],
    }
    path = tmp_path_factory.mktemp("grid") / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    return path


@pytest.fixture(scope="module")
def planned(zygote: Zygote, grid_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plan of the grid before anything of it is made."""
    flags = ("--device-peak-tflops", "0.001", "--mfu", "0.5", "--json")
    code, said = zygote.run("law", "plan", grid_file, "--out", tmp_path_factory.mktemp("none"), *flags)
    assert code == 0, said
    return dict(json.loads(said))


@pytest.fixture(scope="module")
def whole(zygote: Zygote, grid_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid's folder after its run."""
    out = tmp_path_factory.mktemp("whole") / "law"
    code, said = zygote.run("law", "run", grid_file, "--out", out, "--workers", "2")
    assert code == 0, said
    return out


def rows(out: Path) -> dict[tuple[str | None, str | None], LawRun]:
    """By teacher and what the student was cut out of."""
    table = read_table(out / "runs.jsonl")
    found = {(row.teacher.name if row.teacher else None, row.init_source): row for row in table}
    assert len(found) == len(table)
    return found


def phase(plan: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (one for one in plan["phases"] if one["phase"] == name)
    return dict(found)


def test_each_teacher_has_a_row_of_each_init_and_each_cut_a_row_without_a_teacher(whole: Path) -> None:
    found = rows(whole)
    common = {(None, None), ("deep", None), ("wide", None)}
    assert found.keys() == common | {(who, name) for name in TEACHERS for who in (name, None)}
    for (_, source), row in found.items():
        assert row.missing is None and row.tokens == 640
        assert row.init == ("common" if source is None else "pruned")
    assert len({row.loss for row in found.values()}) == 7


def test_the_size_in_a_row_is_that_of_the_model_that_was_made(whole: Path) -> None:
    for (teacher, source), row in rows(whole).items():
        folder = f"{source}/pruned" if source else teacher or "supervised"
        made = read_manifest(whole / f"students/s/{folder}/seed-{SEED}/student/seed-{SEED}")
        assert made is not None
        sizes = {name: made.facts[name] for name in ("num_parameters", "num_non_embedding_parameters")}
        assert sizes == {name: getattr(row.student, name) for name in sizes}
        assert row.student.name == "s"


def test_a_pruned_student_begins_as_a_part_of_its_own_teacher(whole: Path) -> None:
    contents = set()
    for name in TEACHERS:
        student = whole / f"students/s/{name}/pruned/seed-{SEED}/student/seed-{SEED}"
        made, teacher = read_manifest(student), read_manifest(whole / f"teachers/{name}/teacher")
        assert made is not None and teacher is not None and (student / "prune.json").is_file()
        assert made.inputs["teacher"].content == teacher.content
        assert made.totals["num_calibration_sequences"] == 8
        contents.add(made.content)
    common = read_manifest(whole / f"students/s/deep/seed-{SEED}/student/seed-{SEED}")
    assert common is not None and len(contents | {common.content}) == 3


def test_the_fit_keeps_the_inits_apart_and_measures_a_cut_against_itself_alone(whole: Path) -> None:
    found = rows(whole)
    by_init = {curve.init: curve for curve in curves(tuple(found.values()))}
    assert by_init.keys() == {"common", "pruned"}
    for init, curve in by_init.items():
        names = [teacher.name for teacher in curve.teachers]
        sources = {name: name if init == "pruned" else None for name in names}
        assert curve.losses_MR[:, 0].tolist() == [found[name, sources[name]].loss for name in names]
        assert curve.supervised_MR[:, 0].tolist() == [found[None, sources[name]].loss for name in names]


def test_a_plan_counts_the_passes_that_score_the_teachers(planned: dict[str, Any], whole: Path) -> None:
    scoring = phase(planned, "prunings")
    assert scoring["num_runs"] == scoring["num_left"] == 2
    assert scoring["tokens"]["value"] == 2 * 8 * 32  # 8 sequences of 32 targets, of each teacher
    sizes = [row.teacher.num_parameters for (_, source), row in rows(whole).items() if source and row.teacher]
    assert scoring["flops"]["value"] == 2 * 8 * 32 * sum(sizes)
    assert scoring["device_hours"]["value"] == pytest.approx(scoring["flops"]["value"] / 0.5e9 / 3600)
    assert planned["num_rows"] == phase(planned, "students")["num_left"] == 7
    assert phase(planned, "measurements")["num_left"] == 5


def test_a_plan_takes_the_hours_of_a_pruning_from_one_like_it(
    zygote: Zygote, whole: Path, grid_file: Path, tmp_path: Path
) -> None:
    made = [whole / f"students/s/{name}/pruned/seed-{SEED}" for name in TEACHERS]
    like = [word for folder in made for word in ("--like", folder)]
    code, said = zygote.run("law", "plan", grid_file, "--out", tmp_path, "--json", *like)
    assert code == 0, said
    manifests = [read_manifest(folder / f"student/seed-{SEED}") for folder in made]
    hours = sum(one.wall_s for one in manifests if one is not None) / 3600
    found = phase(json.loads(said), "prunings")["device_hours"]
    assert found["value"] == pytest.approx(hours) and found["source"].startswith("measured: "), found


def test_a_second_run_has_nothing_to_do_and_a_lost_cut_is_made_again(
    zygote: Zygote, whole: Path, grid_file: Path
) -> None:
    code, said = zygote.run("law", "run", grid_file, "--out", whole)
    assert code == 0 and "nothing to do: 7 of 7 runs have their result" in said
    before = rows(whole)
    cell = whole / f"students/s/wide/pruned/seed-{SEED}"
    code, said = zygote.run("status", cell / "run.yaml")
    assert code == 0 and "stale" not in said, said
    (cell / f"student/seed-{SEED}/manifest.json").unlink()
    code, said = zygote.run("law", "plan", grid_file, "--out", whole, "--json")
    assert code == 0, said
    assert phase(json.loads(said), "prunings")["num_left"] == 1
    code, said = zygote.run("law", "run", grid_file, "--out", whole)
    assert code == 0 and "made 1 in" in said and f"students/s/wide/pruned/seed-{SEED}" in said, said
    assert {key: row.loss for key, row in rows(whole).items()} == {key: row.loss for key, row in before.items()}
