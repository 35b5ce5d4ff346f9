"""A run file from a stranger: whatever it says, none of its code runs, and nothing but itself is read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import one_line

from capgap.jobs.arguments import parse_run, run_file_parser
from capgap.jobs.cli import main
from capgap.jobs.yaml_nodes import read_document
from capgap.schemas.errors import InputError

BASE: dict[str, Any] = {
    "name": "x",
    "out": "out",
    "corpus": {},
    "teacher": {"model": {}},
    "cache": {},
    "student": {"model": {}},
    "train": {},
}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands there once the module `stranger`, which is on the path, was imported."""
    path = tmp_path / "marker"
    (tmp_path / "stranger.py").write_text(f"open({str(path)!r}, 'w').close()\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return path


@pytest.fixture
def said_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """The one line that is said of a run file."""

    def status(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        assert main(["status", str(path)]) != 0
        return one_line(capsys.readouterr().err)

    return status


def test_the_payload_would_work(marker: Path) -> None:
    subprocess.run([sys.executable, "-c", "import stranger"], check=True, env={"PYTHONPATH": str(marker.parent)})
    assert marker.exists()


@pytest.mark.parametrize(
    "place",
    [
        {"teacher": {"class_path": "stranger.Evil", "init_args": {}}},
        {"train": {"class_path": "stranger.Evil"}},
        {"teacher": {"model": {"class_path": "stranger.Evil"}}},
        {"arms": {"a": {"alpha": {"class_path": "stranger.Evil", "init_args": {}}}}},
        {"corpus": {"sources": [{"class_path": "stranger.Evil"}]}},
        {"train": {"loggers": [{"class_path": "stranger.Evil", "init_args": {}}]}},
        {"arms": {"a": {"loggers": [{"class_path": "stranger.Evil"}]}}},
        {"train": {"loggers": [{"class_path": "csv", "init_args": {"a": {"class_path": "stranger.Evil"}}}]}},
    ],
    ids=["teacher", "train", "optional", "arms", "list", "logger", "logger-of-an-arm", "argument-of-a-logger"],
)
def test_no_class_is_imported(marker: Path, said_of: Callable[[str], str], place: dict[str, Any]) -> None:
    line = said_of(json.dumps(BASE | place))
    assert "class_path: a run file cannot name a class; found stranger.Evil" in line
    assert not marker.exists()


@pytest.mark.parametrize("place", ["train", "arms"])
def test_a_logger_by_its_name_is_one(tmp_path: Path, place: str) -> None:
    loggers = ["csv", {"class_path": "wandb", "init_args": {"project": "students"}}]
    loggers += [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}}]
    settings = {"loggers": loggers} if place == "train" else {"a": {"loggers": loggers}}
    (tmp_path / "run.yaml").write_text(json.dumps(BASE | {"out": str(tmp_path / "out"), place: settings}))
    run, *_ = parse_run(run_file_parser("capgap status", ""), [str(tmp_path / "run.yaml")])
    *by_name, of_lightning = run.train_settings("distilled" if place == "train" else "a").loggers
    assert by_name == loggers[:2]
    # beside other defaults of the class, in an arm
    assert of_lightning["class_path"] == "lightning.pytorch.loggers.CSVLogger"
    assert of_lightning["init_args"]["save_dir"] == "logs"


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/name:stranger.Evil", "!!python/module:stranger", "!stranger"]
)
def test_no_tag_becomes_an_object(marker: Path, said_of: Callable[[str], str], tag: str) -> None:
    argument = f' ["touch {marker}"]' if tag.endswith("system") else " ''"
    text = json.dumps({key: value for key, value in BASE.items() if key != "name"})[1:-1]
    assert "not a YAML file; found could not determine a constructor" in said_of(f"{{name: {tag}{argument}, {text}}}")
    assert not marker.exists()


def _bomb(merge: bool) -> str:
    lines = [f"{key}: {json.dumps(value)}" for key, value in BASE.items()]
    lines += ["arms:", "  a0: &a0 {alpha: 1}"]
    for level in range(12):
        aliases = ", ".join([f"*a{level}"] * 10)
        lines.append(f"  a{level + 1}: &a{level + 1} {{{'<<' if merge else 'x'}: [{aliases}]}}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (_bomb(merge=False), "aliases spelt out"),
        (_bomb(merge=True), "aliases spelt out"),
        ("name: &a [*a]", "line 1: an alias of what it stands in"),
        ("name: " + "[" * 5000, "deep"),
        ("name: x\narms: " + "{a: " * 5000 + "1" + "}" * 5000, "deep"),
        ("name: x\n" + "# a comment\n" * 500_000, "more than 4,194,304 bytes"),
        ("name: [" + "1," * 130_000 + "]", "more than 60,000 values"),
    ],
    ids=["aliases", "merges", "itself", "lists", "maps", "size", "values"],
)
def test_what_would_take_all_memory_or_time_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=why):
        read_document(path)


def test_every_way_to_name_a_run_file_is_guarded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(_bomb(merge=False))
    for arguments in ([str(path)], ["--config", str(path)], [f"--config={path}"]):
        assert main(["status", *arguments]) != 0
        assert "aliases spelt out" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("place", ["train", "teacher", "teacher.training", "student.model"])
def test_no_other_file_is_read(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.yaml").write_text("batch_sequences: 3\n")
    settings = json.loads(json.dumps(BASE))
    *outer, name = place.split(".")
    inner = settings[outer[0]] if outer else settings
    inner[name] = str(tmp_path / "other.yaml")
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    assert main(["status", str(tmp_path / "run.yaml")]) != 0
    line = one_line(capsys.readouterr().err)
    assert f": {place}: cannot be used; found {tmp_path / 'other.yaml'}, expected settings by name" in line


def test_a_run_file_names_no_other_run_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(BASE | {"config": "other.yaml"}))
    assert main(["status", str(tmp_path / "run.yaml")]) != 0
    assert "a run file cannot name another" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    "scheme",
    ["pipe:touch {}", "pipe://touch {}", "exec://touch {}", "simplecache::pipe://touch {}", "zip://a::file://{}",
     "file://{}", "local://{}", "memory://{}", "reference://{}", "ssh://host/{}", "dask://{}"],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["cache", "corpus"])
def test_no_url_starts_a_program(tmp_path: Path, scheme: str, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "run.yaml").write_text(json.dumps(BASE | {"reuse": {stage: scheme.format(marker)}}))
    assert main(["status", str(tmp_path / "run.yaml")]) != 0
    line = one_line(capsys.readouterr().err)
    assert "shards are not read from such a URL" in line or "cannot be reused" in line
    assert not marker.exists()


@pytest.mark.parametrize(
    "source", ["pipe:touch {}", "exec:touch {}", "pipe://touch {}", "simplecache::pipe://touch {}"]
)
def test_no_source_of_text_starts_a_program(tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "ran"
    settings = BASE | {"out": str(tmp_path / "out"), "corpus": {"sources": [source.format(marker)]}}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    assert main(["corpus", str(tmp_path / "run.yaml")]) != 0
    assert "corpus.sources" in one_line(capsys.readouterr().err)
    assert not marker.exists()
