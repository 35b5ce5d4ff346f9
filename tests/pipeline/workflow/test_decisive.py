from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Any, get_args

import pytest
from round_runs import ROUND_ROWS, ROUND_STRUCTURE
from setting_rows import FURTHER_BESIDE, FURTHER_ROWS

from capgap.pipeline.stages import declared
from capgap.pipeline.workflow.state import states
from capgap.schemas.base import Record
from capgap.schemas.run_file import RunFile

ALL = {stage.name for stage in declared()}
FROM_TEACHER = {"teacher", "cache", "train", "eval", "report"}
FROM_CACHE = {"cache", "train", "eval", "report"}
FROM_STUDENT = {"student", "train", "eval", "report"}
FROM_TRAIN = {"train", "eval", "report"}
FROM_ANSWERS = {"answers", "judge", "report"}

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_layers": 3,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "tie_word_embeddings": False,
}
OPTIMIZATION: dict[str, Any] = {
    "learning_rate": 2e-3,
    "final_learning_rate_ratio": 0.2,
    "warmup_fraction": 0.1,
    "weight_decay": 0.2,
    "clip_norm": 2.0,
    "batch_sequences": 16,
    "num_epochs": 2,
    "max_tokens": 10**6,
    "precision": "bf16-mixed",
    "validate_every_steps": 7,
    "num_validation_sequences": 7,
    "output": "best",
    "schedule": "wsd",
    "decay_fraction": 0.2,
    "decay_shape": "linear",
}
OPTIMIZATION_OPERATIONAL: dict[str, Any] = {
    "micro_batch_sequences": 2,
    "checkpoint_every_steps": 7,
    "log_every_steps": 7,
    "loggers": ["csv"],
    "on_corrupt": "skip",
    "decode": "device",
    "num_devices": 2,
    "strategy": "fsdp2",
    "keep_checkpoints": 7,
    "activation_checkpointing": True,
    "compile": True,
}
LORA: dict[str, Any] = {"r": 4, "alpha": 4.0, "dropout": 0.5, "target_modules": ["q_proj"]}
GIVEN_TEACHER = {"teacher.model": None, "teacher.training": None}
TABLE: list[tuple[str, Any, set[str]]] = [
    ("name", "other", {"report"}),
    ("out", "elsewhere", set()),
    ("device", "cpu", set()),
    ("corpus.sources", ["other.txt"], ALL),
    ("corpus.text_field", "body", ALL),
    ("corpus.tokenizer", "folder", ALL),
    ("corpus.messages_field", "messages", ALL),
    ("corpus.on_bad_record", "skip", set()),
    ("corpus.max_bad_fraction", 0.2, set()),
    ("corpus.whole_conversations", True, ALL),
    ("corpus.bos", "never", ALL),
    ("corpus.vocab_size", 512, ALL),
    ("corpus.extend_vocabulary.num_pieces", 7, ALL),
    ("corpus.extend_vocabulary.sources", ["other.txt"], ALL),
    ("corpus.extend_vocabulary.min_frequency", 7, ALL),
    ("corpus.seq_len", 64, ALL),
    ("corpus.long_documents", "drop", ALL),
    ("corpus.context", "document", ALL),
    ("corpus.teacher_fraction", 0.5, ALL),
    ("corpus.heldout_fraction", 0.1, ALL),
    ("corpus.shard_sequences", 64, ALL),
    ("corpus.mixture", {"one": {"paths": ["one.txt"]}, "other": {"paths": ["other.txt"]}}, ALL),
    ("corpus.max_tokens", {"student": 4096}, ALL),
    ("corpus.dedup", "all", ALL),
    ("corpus.unit_bytes", 4096, ALL),
    ("corpus.on_damaged_file", "skip", set()),
    ("corpus.workers", 2, set()),
    ("teacher.path", "folder", FROM_TEACHER),
    *((f"teacher.model.{name}", value, FROM_TEACHER) for name, value in SHAPE.items()),
    *((f"teacher.training.{name}", value, FROM_TEACHER) for name, value in OPTIMIZATION.items()),
    *((f"teacher.training.{name}", value, set()) for name, value in OPTIMIZATION_OPERATIONAL.items()),
    *((f"teacher.adapt.{name}", value, FROM_TEACHER) for name, value in OPTIMIZATION.items()),
    *((f"teacher.adapt.{name}", value, set()) for name, value in OPTIMIZATION_OPERATIONAL.items()),
    ("teacher.adapt.pad_to_multiple_of", 64, FROM_TEACHER),
    ("teacher.home_loss", 2.0, set()),
    ("teacher.seed", 1, FROM_TEACHER),
    ("teacher.served", "other", FROM_TEACHER),
    ("teacher.trust_remote_code", True, FROM_TEACHER),
    ("cache.engine", "transformers", FROM_CACHE),
    ("cache.recording", "topk", FROM_CACHE),
    ("cache.num_samples", 64, FROM_CACHE),
    ("cache.top_k", 8, FROM_CACHE),
    ("cache.profile", "small", FROM_CACHE),
    ("cache.temperature", 2.0, FROM_CACHE),
    ("cache.extra_temperatures", [2.0], FROM_CACHE),
    ("cache.seed", 1, FROM_CACHE),
    ("cache.dtype", "float32", FROM_CACHE),
    ("cache.max_tokens", 10**6, FROM_CACHE),
    ("cache.num_heldout_sequences", 7, FROM_CACHE),
    ("cache.chunk_rows", 7, set()),
    ("cache.batch_tokens", 100, set()),
    ("cache.gpu_memory_fraction", 0.5, set()),
    ("cache.tensor_parallel", 2, set()),
    ("cache.capture", "worker", set()),
    ("cache.cross_check", "never", set()),
    ("cache.replicas", 4, set()),
    ("cache.engine_args", {"kv_cache_dtype": "fp8"}, FROM_CACHE),
    ("cache.server.base_url", "http://elsewhere/v1", set()),
    ("cache.server.api_key_env", "OTHER_KEY", set()),
    ("cache.server.num_parallel", 7, set()),
    ("cache.server.timeout_s", 7.0, set()),
    ("cache.server.num_retries", 7, set()),
    ("student.path", "folder", FROM_STUDENT),
    ("student.trust_remote_code", True, FROM_STUDENT),
    *((f"student.model.{name}", value, FROM_STUDENT) for name, value in SHAPE.items()),
    ("student.prune.num_layers", 2, FROM_STUDENT),
    ("student.prune.hidden_size", 16, FROM_STUDENT),
    ("student.prune.num_heads", 2, FROM_STUDENT),
    ("student.prune.num_key_value_heads", 2, FROM_STUDENT),
    ("student.prune.intermediate_size", 16, FROM_STUDENT),
    ("student.prune.importance", "taylor", FROM_STUDENT),
    ("student.prune.layers", "loss", FROM_STUDENT),
    ("student.prune.num_sequences", 7, FROM_STUDENT),
    ("student.prune.batch_sequences", 7, set()),
    *((f"train.{name}", value, FROM_TRAIN) for name, value in OPTIMIZATION.items()),
    *((f"train.{name}", value, set()) for name, value in OPTIMIZATION_OPERATIONAL.items()),
    ("train.alpha", 0.5, {"train/distilled", "eval", "report"}),  # the other arm has an alpha of its own
    ("train.recording", "sampled", FROM_TRAIN),
    ("train.temperature", 2.0, FROM_TRAIN),
    ("train.divergence", "reverse_kl", FROM_TRAIN),
    ("train.jsd_beta", 0.3, FROM_TRAIN),
    ("train.tail", "renorm", FROM_TRAIN),
    ("train.caches", {"samples": {"recording": "sampled"}}, FROM_TRAIN),
    ("train.own_weight", 3.0, FROM_TRAIN),
    ("train.row_len", 1024, FROM_TRAIN),
    ("train.targets", "online", FROM_TRAIN),
    ("train.final_alpha", 0.5, FROM_TRAIN),
    ("train.alpha_schedule", "cosine", FROM_TRAIN),
    ("train.token_weights", "entropy", FROM_TRAIN),
    ("train.router_loss_weight", 0.1, FROM_TRAIN),
    *((f"tune.{name}", value, {"tune"}) for name, value in OPTIMIZATION.items() if name != "num_epochs"),
    *((f"tune.{name}", value, set()) for name, value in OPTIMIZATION_OPERATIONAL.items()),
    ("tune.num_epochs", 2, {"tune"}),
    ("tune.path", "folder", {"tune"}),
    ("tune.trust_remote_code", True, {"tune"}),
    ("tune.sources", ["other.jsonl"], {"tune"}),
    ("tune.messages_field", "turns", {"tune"}),
    ("tune.on_bad_record", "skip", set()),
    ("tune.max_bad_fraction", 0.2, set()),
    ("tune.chat_template", "own", {"tune"}),
    ("tune.max_len", 64, {"tune"}),
    ("tune.heldout_fraction", 0.2, {"tune"}),
    ("tune.packing", False, {"tune"}),
    *((f"tune.lora.{name}", value, {"tune"}) for name, value in LORA.items()),
    ("eval.num_sequences", 7, {"eval", "report"}),
    ("eval.num_full_sequences", 7, {"eval", "report"}),
    ("eval.num_bootstrap", 700, {"eval", "report"}),
    ("eval.batch_sequences", 7, set()),
    ("benchmarks.tasks", {"mmlu": {"num_fewshot": 0}}, {"benchmark", "report"}),
    ("benchmarks.backend", "hf", {"benchmark", "report"}),
    ("benchmarks.limit", 7, {"benchmark", "report"}),
    ("benchmarks.context_tokens", 77, {"benchmark", "report"}),
    ("benchmarks.apply_chat_template", True, {"benchmark", "report"}),
    ("benchmarks.include_path", "tasks", {"benchmark", "report"}),
    ("benchmarks.trust_task_code", True, set()),
    ("benchmarks.allow_code_execution", True, set()),
    ("benchmarks.batch_sequences", 7, set()),
    ("eval.teacher", "live", {"eval", "report"}),
    ("eval.num_text_samples", 7, {"eval", "report"}),
    ("eval.text_sample_tokens", 7, {"eval", "report"}),
    ("eval.speculative.num_speculative_tokens", 7, {"eval", "report"}),
    ("eval.speculative.num_prompts", 7, {"eval", "report"}),
    ("eval.speculative.num_prompt_tokens", 7, {"eval", "report"}),
    ("eval.speculative.num_new_tokens", 7, {"eval", "report"}),
    ("eval.speculative.gpu_memory_fraction", 0.5, set()),
    *ROUND_ROWS,
    *FURTHER_ROWS,
    ("judge.model", "other", {"judge", "report"}),
    ("judge.base_url", "http://elsewhere/v1", set()),
    ("judge.api_key_env", "OTHER_KEY", set()),
    ("judge.mode", "both", {"judge", "report"}),
    ("judge.questions", "other.jsonl", FROM_ANSWERS),
    ("judge.answers.engine", "transformers", FROM_ANSWERS),
    ("judge.answers.dtype", "float32", FROM_ANSWERS),
    ("judge.answers.max_tokens", 7, FROM_ANSWERS),
    ("judge.answers.temperatures", {"math": 0.1}, FROM_ANSWERS),
    ("judge.answers.temperature", 0.1, FROM_ANSWERS),
    ("judge.answers.top_p", 0.5, FROM_ANSWERS),
    ("judge.answers.seed", 1, FROM_ANSWERS),
    ("judge.answers.gpu_memory_fraction", 0.5, set()),
    ("judge.temperature", 1.0, {"judge", "report"}),
    ("judge.max_tokens", 7, {"judge", "report"}),
    ("judge.num_asks", 7, {"judge", "report"}),
    ("judge.num_bootstrap", 700, {"judge", "report"}),
    ("judge.num_parallel", 7, set()),
    ("judge.timeout_s", 7.0, set()),
    ("judge.num_retries", 7, set()),
]
# What else must be set for the setting above to be allowed, in the run file before and after.
BESIDE = {f"cache.{name}": {"cache.recording": "topk"} for name in ("top_k", "profile", "extra_temperatures")}
TOPK = {"cache.recording": "topk"}
BESIDE |= {f"train.{name}": TOPK for name in ("divergence", "token_weights")}
BESIDE["train.temperature"] = TOPK | {"cache.extra_temperatures": [2.0]}
BESIDE["eval.speculative.gpu_memory_fraction"] = {"eval.speculative": {}}
BESIDE["corpus.messages_field"] = {"corpus.tokenizer": "folder"}
PRUNED = {"student.model": None, "student.prune": {}}
BESIDE |= {path: PRUNED for path, _, _ in TABLE if path.startswith("student.prune.")}
BESIDE["corpus.whole_conversations"] = {
    "corpus.tokenizer": "folder",
    "corpus.messages_field": "messages",
    "corpus.context": "document",
}
BESIDE["train.jsd_beta"] = TOPK | {"train.divergence": "jsd"}
BESIDE["train.own_weight"] = {"train.caches": {"samples": {}}}
BESIDE |= {row[0]: {"judge.model": "one"} for row in TABLE if row[0].startswith("judge.")}
BESIDE["train.alpha_schedule"] = {"train.final_alpha": 0.5}
EXTENDED = {"corpus.tokenizer": "folder", "corpus.extend_vocabulary": {"num_pieces": 5}}
BESIDE |= {path: EXTENDED for path, _, _ in TABLE if path.startswith("corpus.extend_vocabulary.")}
ADAPTED = {"teacher.path": "folder", **GIVEN_TEACHER, "teacher.adapt": {}}
BESIDE |= {path: ADAPTED for path, _, _ in TABLE if path.startswith("teacher.adapt.")}
for _name in ("decay_fraction", "decay_shape"):
    BESIDE[f"teacher.adapt.{_name}"] = ADAPTED | {"teacher.adapt": {"schedule": "wsd"}}
for _stage in ("train", "teacher.training"):
    BESIDE |= {f"{_stage}.{name}": {f"{_stage}.schedule": "wsd"} for name in ("decay_fraction", "decay_shape")}
SERVED = {"teacher.served": "one", **GIVEN_TEACHER, "cache.engine": "server", "cache.recording": "topk"}
# without a teacher to measure, so that there are the same stages before and after
BESIDE["teacher.served"] = SERVED | {"eval.teacher": "cache"}
BESIDE["teacher.trust_remote_code"] = {"teacher.path": "folder", **GIVEN_TEACHER}
BESIDE["student.trust_remote_code"] = {"student.path": "folder", "student.model": None}
_tasks = {"benchmarks.tasks": {"mmlu": {}}}
BESIDE |= {row[0]: _tasks for row in TABLE if row[0].startswith("benchmarks.")}
BESIDE["benchmarks.trust_task_code"] = {**_tasks, "benchmarks.include_path": "tasks"}
BESIDE |= {row[0]: {"rounds.prompts": ["prompts.jsonl"]} for row in ROUND_ROWS} | FURTHER_BESIDE
TUNE: dict[str, Any] = {"sources": ["chat.jsonl"], "warmup_fraction": 0.05, "path": "other"}
BESIDE |= {row[0]: {"tune": dict(TUNE)} for row in TABLE if row[0].startswith("tune.")}
BESIDE |= {f"tune.lora.{name}": {"tune": TUNE | {"lora": {}}} for name in LORA}
BESIDE |= {f"tune.{name}": {"tune": TUNE | {"schedule": "wsd"}} for name in ("decay_fraction", "decay_shape")}
REPLACES = {"teacher.path": GIVEN_TEACHER, "student.path": {"student.model": None}}
STRUCTURE = {"seeds", "arms", "reuse", "benchmarks.teacher", "judge.teacher"}  # each has tests of its own below
# these need a finished cache: tests/pipeline/tune
_of_cache = ("cache", "alpha", "recording", "temperature", "divergence", "jsd_beta", "tail")
STRUCTURE |= {f"tune.{name}" for name in _of_cache} | ROUND_STRUCTURE


def _identities(run: RunFile) -> dict[str, str]:
    return {name: state.order.identity for name, state in states(run).items()}


def _changed(before: RunFile, after: RunFile) -> set[str]:
    old, new = _identities(before), _identities(after)
    assert old.keys() == new.keys()
    return {name for name in old if old[name] != new[name]}


def _instances_of(stages: set[str], run: RunFile) -> set[str]:
    return {name for name in states(run) if any(name == stage or name.startswith(stage + "/") for stage in stages)}


@pytest.mark.parametrize(("path", "value", "stages"), TABLE, ids=[row[0] for row in TABLE])
def test_a_setting_changes_the_identity_of_exactly_these_stages(make_run, path: str, value, stages: set[str]) -> None:
    beside = BESIDE.get(path, {})
    before = make_run(beside)
    after = make_run(beside | REPLACES.get(path, {}) | {path: value})
    assert before != after
    assert _changed(before, after) == _instances_of(stages, before)


def test_the_table_has_every_setting() -> None:
    assert sorted(row[0] for row in TABLE) == sorted(_settings(RunFile))


def _settings(model: type[Record], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        types = get_args(info.annotation) if isinstance(info.annotation, UnionType) else (info.annotation,)
        records = [kind for kind in types if isinstance(kind, type) and issubclass(kind, Record)]
        if records:
            yield from _settings(records[0], f"{prefix}{name}.")
        elif prefix + name not in STRUCTURE:
            yield prefix + name


@pytest.mark.parametrize(
    ("path", "default"),
    [
        ("corpus.vocab_size", 4096),
        ("cache.num_samples", 50),
        ("corpus.seq_len", 256),
        ("cache.num_heldout_sequences", 64),
        ("train.alpha", 1.0),
        ("train.learning_rate", 3e-3),
        ("eval.num_sequences", 512),
        ("teacher.trust_remote_code", False),
        ("student.trust_remote_code", False),
    ],
)
def test_a_default_that_is_spelt_out_changes_nothing(make_run, path: str, default: object) -> None:
    assert _changed(make_run(), make_run({path: default})) == set()


def test_more_defaults_that_are_spelt_out_change_nothing(make_run) -> None:
    topk = {"cache.recording": "topk"}
    assert _changed(make_run(topk), make_run(topk | {"cache.top_k": 64, "cache.profile": "near-lossless"})) == set()
    silent = {"teacher.training": None}
    assert _changed(make_run(silent), make_run({"teacher.training": {}})) == set()
    assert _changed(make_run({"arms.distilled": {"alpha": 1}}), make_run()) == set()
    for stage in ("train", "teacher.training"):
        wsd = {f"{stage}.schedule": "wsd"}
        spelt_out = {f"{stage}.decay_fraction": 0.1, f"{stage}.decay_shape": "exponential"}
        assert _changed(make_run(wsd), make_run(wsd | spelt_out)) == set()
        assert _changed(make_run(), make_run({f"{stage}.schedule": "cosine"})) == set()
    falling = {"train.final_alpha": 0.5}
    assert _changed(make_run(falling), make_run(falling | {"train.alpha_schedule": "linear"})) == set()
    assert _changed(make_run(), make_run({"train.token_weights": "equal", "train.router_loss_weight": 0})) == set()


def test_a_pruned_student_depends_on_the_teacher_and_another_does_not(make_run) -> None:
    for settings, stages in ((PRUNED, FROM_TEACHER | FROM_STUDENT), ({}, FROM_TEACHER)):
        before, after = make_run(settings), make_run(settings | {"teacher.seed": 5})
        assert _changed(before, after) == _instances_of(stages, before)
    spelt_out = PRUNED | {"student.prune": {"importance": "activation", "layers": "block_influence"}}
    assert _changed(make_run(PRUNED), make_run(spelt_out)) == set()


def test_another_arm_leaves_the_others_as_they_are(make_run) -> None:
    old = _identities(make_run())
    new = _identities(make_run({"arms.half": {"alpha": 0.5}}))
    assert set(new) - set(old) == {"train/half/seed-0", "train/half/seed-1"}
    assert {name for name in old if old[name] != new[name]} == {"eval", "report"}


def test_another_seed_leaves_the_others_as_they_are(make_run) -> None:
    old = _identities(make_run({"seeds": [0]}))
    new = _identities(make_run({"seeds": [0, 5]}))
    assert set(new) - set(old) == {"student/seed-5", "train/distilled/seed-5", "train/cross_entropy/seed-5"}
    assert {name for name in old if old[name] != new[name]} == {"eval", "report"}


def test_benchmarks_make_stages_of_their_own_and_leave_the_others_as_they_are(make_run) -> None:
    old, new = _identities(make_run()), _identities(make_run({"benchmarks.tasks": {"mmlu": {}}}))
    models = ["teacher", *(f"{arm}/seed-{seed}" for arm in ("distilled", "cross_entropy") for seed in (0, 1))]
    assert set(new) - set(old) == {f"benchmark/{model}" for model in models}
    assert {name for name in old if old[name] != new[name]} == {"report"}
    students = _identities(make_run({"benchmarks.tasks": {"mmlu": {}}, "benchmarks.teacher": False}))
    assert set(new) - set(students) == {"benchmark/teacher"}
    # whether the teacher is measured too is no matter of a student's
    assert all(students[name] == new[name] for name in students if name != "report")


def test_a_setting_of_one_arm_leaves_the_others_as_they_are(make_run) -> None:
    changed = _changed(make_run(), make_run({"arms.distilled": {"alpha": 0.9}}))
    assert changed == {"train/distilled/seed-0", "train/distilled/seed-1", "eval", "report"}


def test_an_operational_setting_of_one_arm_changes_nothing(make_run) -> None:
    assert _changed(make_run(), make_run({"arms.distilled": {"log_every_steps": 3}})) == set()


def test_seeds_and_arms_have_identities_of_their_own(make_run) -> None:
    found = _identities(make_run({"arms": {"a": {}, "b": {}}}))
    assert len(set(found.values())) == len(found)


def test_the_order_of_arms_and_seeds_changes_no_training(make_run) -> None:
    old = _identities(make_run())
    new = _identities(make_run({"seeds": [1, 0], "arms": {"cross_entropy": {"alpha": 0}, "distilled": {}}}))
    assert old == new


def test_a_judge_adds_stages_and_leaves_the_others_but_the_report_as_they_are(make_run) -> None:
    old, new = _identities(make_run()), _identities(make_run({"judge.model": "one"}))
    answers = {f"answers/{arm}/seed-{seed}" for arm in ("distilled", "cross_entropy") for seed in (0, 1)}
    assert set(new) - set(old) == {"answers/teacher", *answers, "judge"}
    assert {name for name in old if old[name] != new[name]} == {"report"}


def test_without_the_teacher_s_answers_its_students_answer_as_before(make_run) -> None:
    old = _identities(make_run({"judge.model": "one"}))
    new = _identities(make_run({"judge.model": "one", "judge.teacher": False}))
    assert set(old) - set(new) == {"answers/teacher"}
    assert {name for name in new if old[name] != new[name]} == {"judge", "report"}


def test_a_model_s_answers_follow_from_that_model_alone(make_run) -> None:
    judge = {"judge.model": "one"}
    changed = _changed(make_run(judge), make_run(judge | {"arms.distilled": {"alpha": 0.9}}))
    answers = {f"answers/distilled/seed-{seed}" for seed in (0, 1)}
    assert answers | {"judge"} == {name for name in changed if name.startswith(("answers", "judge"))}
