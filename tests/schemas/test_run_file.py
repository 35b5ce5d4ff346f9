from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from capgap.kernels.sparse_kl.divergence import Divergence, Tail, check_pair
from capgap.schemas.run_cache import CacheSettings, RecordingName
from capgap.schemas.run_corpus import CorpusSettings
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_model import ModelShape, StudentSettings, TeacherSettings
from capgap.schemas.run_optimization import LoggerSettings
from capgap.schemas.run_train import SUPPORTED_TAILS, FurtherCache, TrainSettings

ROOT = Path(__file__).resolve().parents[2]
BASE: dict[str, Any] = {
    "name": "tried",
    "out": "runs/tried",
    "corpus": {},
    "teacher": {"model": {}},
    "cache": {},
    "student": {"model": {}},
    "train": {},
}


def _with(settings: dict[str, Any]) -> dict[str, Any]:
    """The smallest run file, with settings by their dotted names."""
    values = copy.deepcopy(BASE)
    for path, value in settings.items():
        *parents, name = path.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return values


def _refusals(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Where and why the run file is refused."""
    with pytest.raises(ValidationError) as caught:
        RunFile.model_validate(_with(settings))
    return [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in caught.value.errors()]


def test_the_smallest_run_file_has_one_arm_and_one_seed() -> None:
    run = RunFile.model_validate(BASE)
    assert (run.seeds, list(run.arms), run.reuse) == ((0,), ["distilled"], {})
    assert run.train_settings("distilled") == run.train == TrainSettings()


@pytest.mark.parametrize(
    "path",
    [*sorted({*ROOT.glob("jobs/runs/*.yaml")} - {*ROOT.glob("jobs/runs/law-*.yaml")}), ROOT / "tests/assets/tiny.yaml"],
    ids=str,
)
def test_every_run_file_that_is_shipped_is_one(path: Path) -> None:
    RunFile.model_validate(yaml.safe_load(path.read_text()))


def test_a_run_file_comes_back_from_json_as_it_was() -> None:
    run = RunFile.model_validate(_with({"cache.recording": "topk", "arms.a": {"alpha": 0}, "seeds": [3, 1]}))
    assert RunFile.model_validate_json(run.model_dump_json()) == run


SHARDS: dict[str, Any] = {"corpus": {}, "teacher": {"path": "t"}, "cache": {}}
FROM_SHARDS: dict[str, Any] = {"reuse": {"cache": "s3://there/cache"}, "student": {"model": {}}, "train": {}}


@pytest.mark.parametrize(
    ("sections", "made"),
    [
        (SHARDS, {"corpus", "teacher", "cache"}),
        (FROM_SHARDS, {"student", "train"}),
        (FROM_SHARDS | {"eval": {}}, {"student", "train", "eval"}),
        ({"corpus": {}}, {"corpus"}),
        ({"reuse": {"cache": "c"}, "student": {"path": "s"}, "arms": {"a": {}}}, {"student", "train"}),
    ],
)
def test_a_section_asks_for_its_stage_and_none_is_asked_for_otherwise(sections: dict[str, Any], made: set[str]) -> None:
    run = RunFile.model_validate({"name": "tried", "out": "runs/tried", **sections})
    assert {section for section in RunFile.model_fields if run.makes(section)} == made
    again = RunFile.model_validate_json(run.model_dump_json())
    assert (again, again.sections) == (run, run.sections)
    assert RunFile.model_validate(run.written()).sections == run.sections


def test_a_run_file_without_any_section_is_refused() -> None:
    with pytest.raises(ValidationError, match="found no section, expected at least one that asks for a stage"):
        RunFile(name="tried", out="runs/tried")


def test_what_a_loss_can_have_of_a_recording_is_what_the_kernel_can() -> None:
    for (recording, divergence), tails in SUPPORTED_TAILS.items():
        for tail in get_args(Tail):
            if tail in tails:
                check_pair(recording, divergence, tail)
            else:
                with pytest.raises(ValueError, match="tail"):
                    check_pair(recording, divergence, tail)
    missing = set(itertools.product(get_args(RecordingName), get_args(Divergence))) - SUPPORTED_TAILS.keys()
    for recording, divergence in missing:
        with pytest.raises(ValueError, match="divergence"):
            check_pair(recording, divergence, "ghost")


@pytest.mark.parametrize(
    "path",
    ["nmae", "corpus.sorces", "teacher.modell", "teacher.model.hiden_size", "teacher.training.alpha", "cache.k",
     "student.seed", "train.lr", "eval.num"],
)  # fmt: skip
def test_an_unknown_key_is_refused_by_its_full_name(path: str) -> None:
    ((where, _),) = _refusals({path: 1})
    assert where.startswith(path)


@pytest.mark.parametrize("path", ["name", "out"])
def test_a_missing_setting_is_named(path: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RunFile.model_validate({name: value for name, value in BASE.items() if name != path})
    assert [(error["loc"], error["type"]) for error in caught.value.errors()] == [((path,), "missing")]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", 3),
        ("out", None),
        ("device", "gpu"),
        ("corpus.sources", "one.txt"),
        ("corpus.vocab_size", 299),
        ("corpus.vocab_size", (1 << 24) + 1),
        ("corpus.seq_len", 7),
        ("corpus.seq_len", "many"),
        ("corpus.seq_len", 64.5),
        ("corpus.long_documents", "keep"),
        ("corpus.teacher_fraction", 1),
        ("corpus.heldout_fraction", 0),
        ("corpus.shard_sequences", 0),
        ("teacher.seed", -1),
        ("cache.engine", "http"),
        ("cache.recording", "all"),
        ("cache.num_samples", 0),
        ("cache.num_samples", 65536),
        ("cache.temperature", 0),
        ("cache.extra_temperatures", "hot"),
        ("corpus.context", "none"),
        ("train.recording", "both"),
        ("train.temperature", 0),
        ("cache.gpu_memory_fraction", 1),
        ("cache.replicas", 0),
        ("train.learning_rate", 0),
        ("train.learning_rate", "fast"),
        ("train.warmup_fraction", 1),
        ("train.alpha", 1.1),
        ("train.alpha", -0.1),
        ("train.precision", "fp8"),
        ("train.num_epochs", 0),
        ("train.caches.code.weight", 0),
        ("train.caches.code.recording", "both"),
        ("train.row_len", 7),
        ("train.num_devices", 0),
        ("train.strategy", "fsdp"),
        ("train.keep_checkpoints", 0),
        ("train.output", "worst"),
        ("eval.num_sequences", 1),
        ("eval.num_bootstrap", 99),
        ("reuse.train.[key]", "folder"),
        ("arms", [1]),
        ("arms.distilled", None),
    ],
)
def test_a_value_of_the_wrong_kind_or_size_is_refused_where_it_stands(path: str, value: object) -> None:
    assert path in [where for where, _ in _refusals({path.removesuffix(".[key]"): value})]


def test_all_faults_are_told_at_once() -> None:
    found = {where for where, _ in _refusals({"cache.num_samples": 0, "train.alpha": 2, "nmae": "x"})}
    assert found == {"cache.num_samples", "train.alpha", "nmae"}


@pytest.mark.parametrize(
    ("settings", "where", "message"),
    [
        (
            {"cache.top_k": 8},
            "cache",
            "cache.top_k: found with recording sampled, expected topk; use cache.num_samples",
        ),
        ({"cache.profile": "small"}, "cache", "cache.profile: found with recording sampled, expected topk"),
        (
            {"cache.extra_temperatures": [2.0]},
            "cache",
            "cache.extra_temperatures: found with recording sampled, expected topk; samples have one temperature",
        ),
        (
            {"cache.recording": "both", "cache.extra_temperatures": [2.0, 1.0]},
            "cache",
            "cache.extra_temperatures: found [2.0, 1.0], expected numbers above 0, none twice, and not 1, which is",
        ),
        (
            {"cache.recording": "topk", "cache.extra_temperatures": [0.0]},
            "cache",
            "cache.extra_temperatures: found [0.0], expected numbers above 0",
        ),
        ({"cache.recording": "topk", "cache.num_samples": 8}, "cache", "cache.num_samples: found with recording topk"),
        ({"corpus.tokenizer": "t", "corpus.vocab_size": 512}, "corpus", "corpus.vocab_size: found beside corpus.token"),
        (
            {"corpus.teacher_fraction": 0.7, "corpus.heldout_fraction": 0.3},
            "corpus",
            "corpus.teacher_fraction + corpus.heldout_fraction: found 1, expected less than 1; nothing is left",
        ),
        ({"corpus.sources": []}, "corpus", "corpus.sources: found none, expected at least one file"),
        ({"teacher.path": "t"}, "teacher", "teacher: found both of path and model, expected one of them"),
        ({"teacher": {}}, "", "teacher: found none of path, model and served, expected one of them"),
        ({"student.path": "s"}, "student", "student: found path and model, expected one of path, model and prune"),
        ({"student": {}}, "", "student: found none of path, model and prune, expected one of them"),
        (
            {"teacher": None},
            "",
            "cache: found without teacher, expected a section teacher, or reuse: {teacher: FOLDER}",
        ),
        (
            {"cache": None},
            "",
            "train: found without cache, expected a section cache, or reuse: {cache: FOLDER}, beside",
        ),
        ({"student": None}, "", "train: found without student, expected a section student beside it"),
        ({"corpus": None}, "", "teacher.model: found without corpus, expected a section corpus, or reuse: {corpus"),
        (
            {"eval.teacher": "live", "teacher": None, "cache": None, "reuse": {"cache": "c"}},
            "",
            "eval.teacher: found w",
        ),
        (
            {"train.divergence": "jsd"},
            "",
            "arms.distilled.divergence: found jsd with a sampled cache, expected forward",
        ),
        (
            {"train.tail": "ghost"},
            "",
            "arms.distilled.tail: found ghost with forward_kl and a sampled cache, expected d",
        ),
        (
            {"train.temperature": 2},
            "",
            "arms.distilled.temperature: found 2, expected 1, at which the cache is to be mad",
        ),
        (
            {"train.token_weights": "entropy"},
            "",
            "arms.distilled.token_weights: found entropy with a sampled cache, exp",
        ),
        (
            {"train.recording": "topk"},
            "",
            "arms.distilled.recording: found topk, expected sampled, which is what cache.r",
        ),
        ({"cache.recording": "both"}, "", "arms.distilled.recording: found none named, expected one of sampled, topk"),
        (
            {"teacher": {"path": "t", "training": {}}},
            "teacher",
            "teacher.training: found beside teacher.path, expected only with teacher.model",
        ),
        (
            {"student.model": {"hidden_size": 100, "num_heads": 8}},
            "student.model",
            "hidden_size: found 100, expected a multiple of 2 x num_heads = 16",
        ),
        (
            {"student.model": {"hidden_size": 96, "num_heads": 6, "num_key_value_heads": 4}},
            "student.model",
            "num_key_value_heads: found 4, expected a divisor of 6",
        ),
        (
            {"train.batch_sequences": 8, "train.micro_batch_sequences": 3},
            "train",
            "micro_batch_sequences: found 3, expected a divisor of batch_sequences = 8",
        ),
        ({"train.caches": {"a/b": {}}}, "train", "caches: found the name 'a/b', expected a word"),
        ({"train.own_weight": 2}, "train", "own_weight: found 2 without caches, expected it beside others"),
        ({"corpus.messages_field": "messages"}, "corpus", "corpus.messages_field: found without corpus.tokenizer"),
        (
            {"train.decay_fraction": 0.1},
            "train",
            "decay_fraction: found 0.1 with schedule cosine, expected it with wsd",
        ),
        (
            {"train.decay_shape": "sqrt"},
            "train",
            "decay_shape: found sqrt with schedule cosine, expected it with wsd",
        ),
        (
            {"train.schedule": "wsd", "train.warmup_fraction": 0.5, "train.decay_fraction": 0.75},
            "train",
            "warmup_fraction + decay_fraction: found 1.25, expected at most 1",
        ),
        (
            {"train.schedule": "wsd", "train.final_learning_rate_ratio": 0},
            "train",
            "final_learning_rate_ratio: found 0 with decay_shape exponential, expected more than 0",
        ),
        (
            {"train.alpha_schedule": "cosine"},
            "train",
            "alpha_schedule: found cosine alone, expected it with final_alpha",
        ),
        ({"seeds": []}, "", "seeds: found [], expected at least one, none twice, none negative"),
        ({"seeds": [1, 2, 1]}, "", "seeds: found [1, 2, 1], expected at least one"),
        ({"seeds": [-1]}, "", "seeds: found [-1], expected at least one"),
        ({"arms": {}}, "", "arms: found none, expected at least one; leave the setting out for `distilled` alone"),
        ({"arms.a.lr": 1}, "arms.a.lr", "Extra inputs are not permitted"),
        ({"arms.a.alpha": 2}, "arms.a.alpha", "Input should be less than or equal to 1"),
        ({"arms.a.micro_batch_sequences": 3}, "arms.a", "micro_batch_sequences: found 3, expected a divisor"),
    ],
)
def test_settings_that_contradict_one_another_are_refused_in_the_users_words(
    settings: dict[str, Any], where: str, message: str
) -> None:
    ((found_where, found),) = _refusals(settings)
    assert found_where == where
    assert found.startswith(message)


@pytest.mark.parametrize("name", ["a/b", "..", "../up", ".a", "", "a b", "a\n"])
@pytest.mark.parametrize("setting", ["name", "arms"])
def test_run_and_arms_must_be_able_to_name_a_folder(setting: str, name: str) -> None:
    ((_, message),) = _refusals({setting: name if setting == "name" else {name: {}}})
    assert message.startswith(f"name, arms: found {name!r}, expected a folder's name")


def test_an_arm_is_the_training_with_its_own_settings_in_their_place() -> None:
    values = {"train.alpha": 0.5, "train.num_epochs": 3, "arms": {"plain": {}, "own": {"alpha": 0, "clip_norm": 2}}}
    run = RunFile.model_validate(_with(values))
    assert run.train_settings("plain") == run.train
    assert run.train_settings("own") == run.train.model_copy(update={"alpha": 0.0, "clip_norm": 2.0})
    with pytest.raises(ValueError, match="arms: found no 'other', expected one of own, plain"):
        run.train_settings("other")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        StudentSettings(model=ModelShape()).path = "other"  # type: ignore[misc]


def test_every_setting_says_what_it_is() -> None:
    models = {RunFile, CorpusSettings, TeacherSettings, CacheSettings, StudentSettings, TrainSettings, ModelShape}
    models |= {FurtherCache, LoggerSettings}
    silent = [f"{m.__name__}.{name}" for m in models for name, info in m.model_fields.items() if not info.description]
    assert silent == []
