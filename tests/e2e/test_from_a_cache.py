"""A finished cache behind a URL is enough: a whole run from it, report included, where nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import yaml
from command import TINY, capgap

from capgap.pipeline.stage.manifests import read_manifest

# What a run of the tiny one's cache trains; teacher and corpus are not named.
SECTIONS = ("student", "train", "arms", "eval")


@pytest.fixture
def cache(finished: Path) -> Iterator[Path]:
    """The tiny run's cache, while all that it was made of is out of reach."""
    hidden = [(finished / stage, finished / f"hidden-{stage}") for stage in ("corpus", "teacher")]
    for path, away in hidden:
        path.rename(away)
    yield finished / "cache"
    for path, away in hidden:
        away.rename(path)


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a run file that reads the cache at a path or URL, and trains and measures students."""
    monkeypatch.setenv("CAPGAP_DOWNLOADS", str(tmp_path / "downloads"))

    def write(location: str) -> Path:
        tiny = yaml.safe_load(TINY.read_text())
        run = {"name": "from-a-cache", "out": str(tmp_path / "out"), "reuse": {"cache": location}}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(run | {name: tiny[name] for name in SECTIONS}))
        return path

    return write


def _assert_makes_the_same_students(path: Path, finished: Path, out: Path) -> None:
    done = capgap("run", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report.html" in done.stdout + done.stderr
    made = sorted(file.parent.relative_to(out).as_posix() for file in out.rglob("manifest.json"))
    students = [f"train/{arm}/seed-0" for arm in ("cross_entropy", "distilled")]
    assert made == ["eval", "report", "student/seed-0", *students]
    for name in ("student/seed-0", *students):
        here, there = (read_manifest(folder / name) for folder in (out, finished))
        assert here is not None and there is not None
        weights = [{f.path: f.sha256 for f in one.files if f.path.endswith(".safetensors")} for one in (here, there)]
        assert weights[0] == weights[1], name
    results = json.loads((out / "eval" / "results.json").read_bytes())
    assert sorted(model["arm"] for model in results["models"]) == ["cross_entropy", "distilled"]
    assert all(model["against_cache"] is not None and model["bits_per_byte"] > 0 for model in results["models"])
    assert (out / "report" / "report.html").stat().st_size > 10_000
    before = {name: (out / name / "manifest.json").read_bytes() for name in made}
    again = capgap("run", path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {name: (out / name / "manifest.json").read_bytes() for name in made} == before, "nothing was left to do"


@pytest.mark.slow  # as from S3, and what the project's own check does in an empty folder
def test_a_run_from_a_folder(cache: Path, finished: Path, run_file: Callable[[str], Path], tmp_path: Path) -> None:
    _assert_makes_the_same_students(run_file(str(cache)), finished, tmp_path / "out")


@pytest.mark.slow  # as from S3, by another way
def test_a_run_over_http(
    cache: Path, finished: Path, serve: Callable[[Path], str], run_file: Callable[[str], Path], tmp_path: Path
) -> None:
    _assert_makes_the_same_students(run_file(serve(cache)), finished, tmp_path / "out")


def test_a_run_from_s3(
    cache: Path, finished: Path, s3_server: str, run_file: Callable[[str], Path], tmp_path: Path
) -> None:
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir("caches")
    filesystem.put(str(cache), "caches/tiny", recursive=True)
    _assert_makes_the_same_students(run_file("s3://caches/tiny"), finished, tmp_path / "out")
