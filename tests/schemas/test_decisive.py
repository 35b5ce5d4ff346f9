"""What of the settings decides what a stage makes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from pydantic import ValidationError

from capgap.schemas.base import Record
from capgap.schemas.run_benchmark import BenchmarkSettings, BenchmarkTask
from capgap.schemas.run_cache import CacheSettings
from capgap.schemas.run_corpus import CorpusSettings, ExtendVocabularySettings
from capgap.schemas.run_eval import EvalSettings, SpeculativeSettings
from capgap.schemas.run_judge import AnswerSettings, JudgeSettings
from capgap.schemas.run_model import ModelShape, StudentSettings, TeacherSettings
from capgap.schemas.run_optimization import OptimizationSettings
from capgap.schemas.run_prune import PruneSettings
from capgap.schemas.run_train import TrainSettings

BASE: dict[str, Any] = {
    "name": "tried",
    "out": "runs/tried",
    "corpus": {},
    "teacher": {"model": {}},
    "cache": {},
    "student": {"model": {}},
    "train": {},
}


MORE = ExtendVocabularySettings(num_pieces=5)


@pytest.mark.parametrize(
    ("record", "operational"),
    [
        (
            CorpusSettings(
                tokenizer="t",
                messages_field="messages",
                context="document",
                whole_conversations=True,
                extend_vocabulary=MORE,
            ),
            {"on_bad_record": "skip", "on_damaged_file": "skip", "workers": 7, "max_bad_fraction": 0.2},
        ),
        (
            CacheSettings(num_heldout_sequences=7),
            {
                "chunk_rows": 7,
                "batch_tokens": 99,
                "gpu_memory_fraction": 0.5,
                "tensor_parallel": 2,
                "capture": "public",
                "replicas": 4,
                "cross_check": "never",
                "server": {"base_url": "http://elsewhere/v1"},
            },
        ),
        (
            TrainSettings(
                divergence="jsd",
                tail="renorm",
                row_len=1024,
                final_alpha=0.5,
                token_weights="entropy",
                router_loss_weight=0.1,
                schedule="wsd",
                output="best",
            ),
            {
                "micro_batch_sequences": 2,
                "checkpoint_every_steps": 7,
                "log_every_steps": 7,
                "loggers": ["csv", {"class_path": "wandb", "init_args": {"offline": True}}],
                "on_corrupt": "skip",
                "decode": "device",
                "activation_checkpointing": True,
                "compile": True,
                "num_devices": 2,
                "strategy": "fsdp2",
                "keep_checkpoints": 7,
            },
        ),
        (ModelShape(), {}),
        (PruneSettings(num_layers=2), {"batch_sequences": 7}),
        (
            EvalSettings(teacher="live", num_text_samples=7, text_sample_tokens=7, speculative=SpeculativeSettings()),
            {"batch_sequences": 7},
        ),
        (SpeculativeSettings(), {"gpu_memory_fraction": 0.5}),
        (
            BenchmarkSettings(tasks={"mmlu": BenchmarkTask()}, include_path="tasks"),
            {"teacher": False, "trust_task_code": True, "allow_code_execution": True, "batch_sequences": 7},
        ),
        (AnswerSettings(), {"gpu_memory_fraction": 0.5}),
        (
            JudgeSettings(model="one"),
            {
                "base_url": "http://elsewhere/v1",
                "api_key_env": "OTHER_KEY",
                "num_parallel": 7,
                "timeout_s": 7.0,
                "num_retries": 7,
            },
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_operational_settings_and_no_others_are_left_out_of_what_decides(record: Record, operational: dict) -> None:
    changed = type(record).model_validate({**record.model_dump(), **operational})
    assert changed.decisive() == record.decisive()
    silent = {name for name in type(record).model_fields if name not in record.decisive()}
    assert silent == set(operational)


def test_operational_settings_inside_others_are_left_out_too() -> None:
    plain, other = (
        TeacherSettings.model_validate({"model": {}, "training": {"num_epochs": 2, **more}})
        for more in ({}, {"log_every_steps": 3})
    )
    assert plain != other
    assert plain.decisive() == other.decisive()
    assert "log_every_steps" not in plain.decisive()["training"]
    assert plain.decisive()["training"]["num_epochs"] == 2


def test_what_is_left_out_decides_like_its_default_spelt_out() -> None:
    pairs = [
        (TeacherSettings(model=ModelShape()), TeacherSettings.model_validate({"model": {}, "training": {}})),
        (CacheSettings(), CacheSettings(num_samples=50)),
        (CacheSettings(recording="topk"), CacheSettings(recording="topk", top_k=64, profile="near-lossless")),
        (
            CacheSettings(recording="both", extra_temperatures=(3.0, 2.0)),
            CacheSettings(
                recording="both", num_samples=50, top_k=64, profile="near-lossless", extra_temperatures=(2.0, 3.0)
            ),
        ),
        (CorpusSettings(), CorpusSettings(vocab_size=4096)),
        (TrainSettings(divergence="jsd"), TrainSettings(divergence="jsd", jsd_beta=0.5)),
        (PruneSettings(), PruneSettings(layers="block_influence")),
        (PruneSettings(importance="random"), PruneSettings(importance="random", layers="random")),
        (TrainSettings(final_alpha=0.5), TrainSettings(final_alpha=0.5, alpha_schedule="linear")),
        (
            OptimizationSettings(schedule="wsd"),
            OptimizationSettings(schedule="wsd", decay_fraction=0.1, decay_shape="exponential"),
        ),
    ]
    for silent, spelt in pairs:
        assert silent != spelt
        assert silent.decisive() == spelt.decisive()


def test_a_choice_of_loss_or_schedule_decides() -> None:
    plain = TrainSettings().decisive()
    chosen: list[dict] = [
        {"divergence": "reverse_kl"},
        {"divergence": "jsd"},
        {"divergence": "jsd", "jsd_beta": 0.1},
        {"tail": "label"},
        {"tail": "drop"},
        {"final_alpha": 1.0},
        {"final_alpha": 0.0},
        {"final_alpha": 0.0, "alpha_schedule": "cosine"},
        {"token_weights": "entropy"},
        {"router_loss_weight": 0.1},
        {"schedule": "wsd"},
        {"schedule": "wsd", "decay_fraction": 0.2},
        {"schedule": "wsd", "decay_shape": "sqrt"},
    ]
    found = [TrainSettings.model_validate(settings).decisive() for settings in chosen]
    assert all(one != other for one, other in itertools.combinations([plain, *found], 2))


def test_further_caches_decide_by_what_is_taken_of_them_and_not_by_where_they_lie() -> None:
    plain, here, there, more = (
        TrainSettings.model_validate({"micro_batch_sequences": size, "caches": caches}).decisive()
        for size, caches in (
            (None, {}),
            (None, {"a": {"path": "here"}}),
            (8, {"a": {"path": "there"}}),
            (None, {"a": {"path": "here", "weight": 2}}),
        )
    )
    assert here == there != more and plain["caches"] == {}
    # a step is the unit of the mix
    smaller = TrainSettings.model_validate({"micro_batch_sequences": 4, "caches": {"a": {"path": "here"}}})
    assert smaller.decisive() == here


def test_a_tail_is_refused_where_the_teacher_is_asked() -> None:
    with pytest.raises(ValidationError, match="tail: found ghost with targets online, expected none; there is no tail"):
        TrainSettings(targets="online", tail="ghost")


def test_drafts_for_a_teacher_that_is_left_out_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"eval.speculative: found with eval.teacher cache, expected live"):
        EvalSettings(teacher="cache", speculative=SpeculativeSettings())


def test_a_beta_without_jsd_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"jsd_beta: found .* with divergence forward_kl, expected it with jsd"):
        TrainSettings(jsd_beta=0.3)


def test_what_cannot_be_extended_or_adapted_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"corpus\.extend_vocabulary: found without corpus\.tokenizer"):
        CorpusSettings.model_validate({"extend_vocabulary": {"num_pieces": 5}})
    with pytest.raises(
        ValidationError, match=r"teacher\.adapt: found with teacher\.model, expected it with teacher\.p"
    ):
        TeacherSettings.model_validate({"model": {}, "adapt": {}})


def test_a_student_has_one_origin() -> None:
    with pytest.raises(ValidationError, match="found path and prune, expected one of path, model and prune"):
        StudentSettings(path="folder", prune=PruneSettings())


def test_code_is_trusted_of_a_given_model_only_and_decides() -> None:
    for settings in (TeacherSettings, StudentSettings):
        given, trusted = settings(path="folder"), settings(path="folder", trust_remote_code=True)
        assert given.decisive() != trusted.decisive()
        assert trusted.decisive()["trust_remote_code"] is True
        with pytest.raises(ValidationError, match=r"trust_remote_code: found true with .*, expected it with .*path"):
            settings(model=ModelShape(), trust_remote_code=True)
