"""A student that learns from several caches: of other corpora, teachers, recordings, lengths and context rules."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tiny_runs import SEQ_LEN, salted_texts, save_teacher
from tiny_texts import write_texts
from transformers import AutoModelForCausalLM

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.identity import seal_of
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.state import states
from capgap.schemas.errors import CapgapError, InputError, MismatchError, SettingError
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

TRAIN = Instance("train", "distilled", 1)
NEEDED = (Instance("corpus"), Instance("teacher"), Instance("cache"), Instance("student", seed=1))


def _texts(folder: Path, salt: str) -> str:
    return str(write_texts(folder, salted_texts(salt)) / "*.txt")


def _teacher(folder: Path, seed: int, texts: list[str]) -> str:
    save_teacher(folder, texts, seed)
    return str(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """`own`, with a student; and caches of other runs, each with a corpus, a teacher or a recording of its own."""
    folder = tmp_path_factory.mktemp("runs")
    sources = {salt: _texts(folder / salt, salt) for salt in ("number", "square", "short")}
    texts = [path.read_text() for path in sorted((folder / "number").iterdir())]
    teachers = {seed: _teacher(folder / f"teacher {seed}", seed, texts) for seed in (1, 2)}
    other = _teacher(folder / "other", 1, texts[:9])
    own: dict[str, Any] = {
        "name": "own",
        "out": str(folder / "own"),
        "device": "cpu",
        "seeds": [1],
        "corpus": {"sources": [sources["number"]], "tokenizer": teachers[1], "seq_len": SEQ_LEN},
        "teacher": {"path": teachers[1]},
        "cache": {"engine": "transformers", "num_samples": 20},
        "student": {"model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}},
        "train": {"batch_sequences": 4, "log_every_steps": 2, "max_tokens": 30 * 4 * SEQ_LEN, "learning_rate": 1e-2},
    }
    own["corpus"] |= {"teacher_fraction": 0.0, "heldout_fraction": 0.2}

    def run(name: str, **changes: Any) -> dict[str, Any]:
        parts = {part: own[part] | values for part, values in changes.items()}
        return own | {"name": name, "out": str(folder / name)} | parts

    runs = {
        "own": own,
        "second": run("second", teacher={"path": teachers[2]}),
        "square": run(
            "square",
            corpus={"sources": [sources["square"]]},
            cache={"recording": "both", "extra_temperatures": [2.0]},
            train={"recording": "topk"},
        ),
        "documents": run(
            "documents",
            corpus={"sources": [sources["short"]], "seq_len": 12, "context": "document"},
            cache={"recording": "topk", "num_samples": None},
        ),
        "foreign": run("foreign", corpus={"tokenizer": other}, teacher={"path": other}),
        "long": run("long", corpus={"seq_len": 2 * SEQ_LEN}),
    }
    for name, settings in runs.items():
        if name == "long":
            settings["teacher"] = {"path": _longer(Path(teachers[1]), folder / "longer")}
        for instance in NEEDED[: 4 if name == "own" else 3]:
            carry_out(RunFile.model_validate(settings), instance)
    return runs


def _longer(teacher: Path, folder: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.config.max_position_embeddings = 2 * SEQ_LEN
    model.save_pretrained(folder)
    for path in teacher.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return str(folder)


@pytest.fixture
def train(made) -> Callable[..., Manifest]:
    def make(caches: dict[str, dict[str, Any]], **settings: Any) -> Manifest:
        given = {name: {"path": f"{made[name]['out']}/cache"} | cache for name, cache in caches.items()}
        return carry_out(_run(made, given, **settings), TRAIN, remake=True)

    return make


def _run(made, caches: dict[str, dict[str, Any]], **settings: Any) -> RunFile:
    """With its own cache reused, so that the stage is reached with what does not fit that."""
    own = {name: value for name, value in made["own"].items() if name != "cache"}
    own["reuse"] = {"cache": f"{own['out']}/cache"}
    return RunFile.model_validate(own | {"train": own["train"] | {"caches": caches} | settings})


def _weights(manifest: Manifest) -> str:
    (digest,) = (file.sha256 for file in manifest.files if file.path.endswith(".safetensors"))
    return digest


def _kl(made) -> list[float]:
    with (Path(made["own"]["out"]) / TRAIN.name / "metrics.csv").open() as file:
        return [float(row["train_kl"]) for row in csv.DictReader(file) if row["train_kl"]]


def test_a_student_learns_from_other_corpora_teachers_recordings_lengths_and_rules_at_once(made, train) -> None:
    caches = {"second": {}, "square": {"weight": 2, "recording": "topk"}, "documents": {}}
    manifest = train(caches, row_len=40, own_weight=2)
    assert set(manifest.inputs) == {"corpus", "cache", "student/seed-1", *(f"caches/{name}" for name in caches)}
    for name in caches:
        other = read_manifest(Path(made[name]["out"]) / "cache")
        entry = manifest.inputs[f"caches/{name}"]
        assert other is not None and (entry.identity, entry.content) == (other.identity, other.content)
    assert 25 * 4 * SEQ_LEN < manifest.totals["num_tokens"] <= 30 * 4 * SEQ_LEN
    kl = _kl(made)
    assert sum(kl[-3:]) < sum(kl[:3]), "of four teachers' rows, each with an entropy of its own"
    assert _weights(manifest) == _weights(train(caches, row_len=40, own_weight=2)), "the same again"
    assert _weights(manifest) != _weights(train(caches, row_len=40)), "weights weigh"
    assert _weights(manifest) != _weights(train({}, row_len=40))


def test_two_teachers_of_one_corpus(made, train) -> None:
    both, own = train({"second": {}}), train({})
    assert both.totals["num_tokens"] == own.totals["num_tokens"]
    assert _weights(both) != _weights(own)
    # the mean over both: each alone is nearer to its own teacher
    assert len({_weights(train({"second": {"weight": weight}})) for weight in (0.1, 1, 10)}) == 3


def test_both_recordings_of_one_cache_are_mixed(made, train, tmp_path) -> None:
    run = made["square"] | {"out": str(tmp_path)}
    run["reuse"] = {stage: f"{made['square']['out']}/{stage}" for stage in ("corpus", "teacher", "cache")}
    run["train"] = run["train"] | {"recording": "sampled", "caches": {"kept": {"recording": "topk"}}}
    carry_out(RunFile.model_validate(run), NEEDED[3])
    manifest = carry_out(RunFile.model_validate(run), TRAIN)
    assert set(manifest.inputs) == {"corpus", "cache", "student/seed-1"}
    assert manifest.totals["num_steps"] == 30


def test_a_further_cache_behind_a_url_trains_the_same_student(made, train, s3_server, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CAPGAP_DOWNLOADS", str(tmp_path / "downloads"))
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir("further")
    filesystem.put(f"{made['second']['out']}/cache", "further/second", recursive=True)
    here = train({"second": {}})
    run = _run(made, {"second": {"path": "s3://further/second"}})
    assert states(run)[TRAIN.name].why == "", "what lies there decides, not where"
    there = carry_out(run, TRAIN, remake=True)
    assert there.inputs["caches/second"].path == "s3://further/second"
    assert _weights(here) == _weights(there)


@pytest.mark.parametrize(
    ("caches", "settings", "error", "message"),
    [
        ({"square": {}}, {}, SettingError, "train.caches.square.recording: the cache has several recordings; found"),
        ({"second": {"recording": "topk"}}, {}, SettingError, "train.caches.second.recording: the cache has no such"),
        (
            {"square": {"recording": "topk"}},
            {"divergence": "reverse_kl"},
            MismatchError,
            ".*own/cache: the cache does not support this divergence; found sampled targets with train.divergence rev",
        ),
        (
            {"square": {"recording": "sampled"}},
            {"tail": "ghost", "alpha": 0.5},
            MismatchError,
            ".*the cache does not support this divergence; found sampled targets with .* train.tail ghost",
        ),
        (
            {"square": {"recording": "topk"}},
            {"temperature": 2.0},
            SettingError,
            "train.temperature: the cache's recording sampled has no targets at this temperature; found 2, expected 1",
        ),
        ({"foreign": {}}, {}, MismatchError, "train.caches.foreign: .*foreign/cache: cache and student have different"),
        (
            {"long": {}},
            {"row_len": 64},
            InputError,
            "train.caches.long: .*: the student takes shorter sequences than the cache has; found sequences of 64 targ",
        ),
        (
            {"documents": {}},
            {},
            SettingError,
            "train.caches.documents: .* caches with sequences of different lengths need rows of one length; found seq"
            "uences of 12 targets beside 32, expected train.row_len; set train.row_len to 32 or more",
        ),
        ({"documents": {}}, {"row_len": 16}, SettingError, "train.row_len: a row is shorter than a sequence; found 16"),
        ({}, {"row_len": 96}, SettingError, "train.row_len: a micro-batch does not fill its rows; found 4 .* 3 a row"),
        (
            {"second": {}},
            {"batch_sequences": 4096},
            InputError,
            "train: .*own/cache: the cache has fewer sequences than a step; found .* sequences, expected at least 4096",
        ),
    ],
)  # fmt: skip
def test_caches_that_do_not_fit_are_refused_before_the_finished_student_is_touched(
    made, train, caches, settings, error: type[CapgapError], message: str
) -> None:
    finished = train({})
    with pytest.raises(error) as caught:
        train(caches, **settings)
    assert re.match(message, str(caught.value)), str(caught.value)
    assert read_manifest(Path(made["own"]["out"]) / TRAIN.name) == finished


def test_a_temperature_that_a_further_cache_lacks_is_named(made, train) -> None:
    run = made["square"]["train"] | {"recording": "topk", "temperature": 2.0}
    given = made["square"] | {"train": run | {"caches": {"second": {"path": f"{made['second']['out']}/cache"}}}}
    carry_out(RunFile.model_validate(given), NEEDED[3])
    message = (
        "train.caches.second: the cache's recording sampled has no targets at this temperature; found 2, expected 1"
    )
    with pytest.raises(SettingError, match=message):
        carry_out(RunFile.model_validate(given), TRAIN)


def test_an_empty_cache_is_refused(made, tmp_path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    manifest = read_manifest(Path(made["second"]["out"]) / "cache")
    assert manifest is not None
    sets = {name: one.model_copy(update={"shards": ()}) for name, one in manifest.shard_sets.items()}
    empty = manifest.model_copy(update={"shard_sets": sets, "seal": ""})
    empty = empty.model_copy(update={"seal": seal_of(empty)})
    (folder / "manifest.json").write_text(empty.model_dump_json())
    with pytest.raises(InputError, match=r"train.caches.none: .*empty: the cache is empty; found 0 sequences,"):
        carry_out(_run(made, {"none": {"path": str(folder)}}), TRAIN, remake=True)
