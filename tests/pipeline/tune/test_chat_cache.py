"""From a corpus of conversations and its cache by a chat teacher to a student that is trained and then tuned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_chats import MAX_LEN, conversations, write
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from capgap.pipeline.stage.context import Instance, StageInput
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import read_blocks
from capgap.pipeline.train.metrics import read_rows
from capgap.pipeline.tune.lesson import lesson_of
from capgap.pipeline.tune.template import with_template
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import CapgapError, InputError
from capgap.schemas.run_file import RunFile

TUNE = Instance("tune", arm="distilled", seed=0)


@pytest.fixture(scope="module")
def taught(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run whose teacher talks, with everything that a tuning needs: its student learnt from the same cache."""
    folder = tmp_path_factory.mktemp("taught")
    tokenizer, _ = with_template(AutoTokenizer.from_pretrained(base), "roles")
    tokenizer.save_pretrained(folder / "teacher")
    config = LlamaConfig.from_pretrained(base, vocab_size=len(tokenizer), initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    run = {
        "name": "taught",
        "out": str(folder / "out"),
        "device": "cpu",
        "corpus": {
            "sources": [write(folder / "chat.jsonl", [{"messages": messages} for messages in conversations()])],
            "tokenizer": str(folder / "teacher"),
            "messages_field": "messages",
            "whole_conversations": True,
            "context": "document",
            "seq_len": MAX_LEN,
            "teacher_fraction": 0.0,
            "heldout_fraction": 0.2,
        },
        "teacher": {"path": str(folder / "teacher")},
        "cache": {"engine": "transformers", "recording": "both", "num_samples": 20, "top_k": 9},
        "student": {"model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}},
        "train": {"batch_sequences": 4, "max_tokens": 2 * 4 * MAX_LEN, "alpha": 0.0, "loggers": []},
        "tune": {
            "cache": str(folder / "out" / "cache"),
            "recording": "topk",
            "alpha": 0.5,
            "learning_rate": 1e-2,
            "batch_sequences": 4,
            "validate_every_steps": 10,
            "loggers": [],
        },
    }
    known = RunFile.model_validate({**run, "tune": None})
    for name in ("corpus", "teacher", "cache"):
        carry_out(known, Instance(name))
    carry_out(known, Instance("student", seed=0))
    carry_out(known, Instance("train", arm="distilled", seed=0))
    return run


def _run(taught: dict[str, Any], out: Path | None = None, **tune: Any) -> RunFile:
    return RunFile.model_validate(taught | {"tune": taught["tune"] | tune} | ({"out": str(out)} if out else {}))


@pytest.mark.parametrize("recording", ["topk", "sampled"])
def test_a_trained_student_learns_from_a_chat_teachers_cache(taught: dict[str, Any], recording: str) -> None:
    manifest = carry_out(_run(taught, recording=recording, alpha=1.0), TUNE, remake=True)
    rows = read_rows(Path(taught["out"]) / TUNE.name / "metrics.csv")
    assert manifest.inputs.keys() == {"train/distilled/seed-0", "caches/chat"}
    assert any(float(row["train_kl"]) > 0 for row in rows if row["train_kl"])
    near = "heldout_kl" if recording == "topk" else "heldout_teacher_ce"
    measured = [float(row[near]) for row in rows if row[near]]
    assert measured[-1] < measured[0]
    (before,) = [row for row in rows if row["step"] == "0"]
    assert manifest.totals["heldout_loss_before"] == float(before["validation_loss"])
    assert manifest.totals[f"first_{near}"] == float(before[near])
    folder = Path(taught["out"]) / TUNE.name / "model"
    tokenizer, teachers = (AutoTokenizer.from_pretrained(path) for path in (folder, taught["teacher"]["path"]))
    assert tokenizer.chat_template == teachers.chat_template
    assert f"1 x 1^2 x forward_kl from the chat teacher ({recording})" in (folder / "README.md").read_text()


def test_the_cache_has_whole_conversations_and_the_mask_of_their_answers(taught: dict[str, Any]) -> None:
    corpus, cache = (
        json.loads((Path(taught["out"]) / stage / "manifest.json").read_bytes()) for stage in ("corpus", "cache")
    )
    assert corpus["totals"]["num_dropped_answers"] == 0
    known = states(_run(taught))
    manifests = {stage: known[stage].manifest for stage in ("corpus", "cache")}
    masks = {}
    for stage, name in (("corpus", "student"), ("cache", "topk")):
        manifest = manifests[stage]
        assert manifest is not None
        blocks = [block for block, _ in read_blocks(Path(taught["out"]) / stage, manifest.shard_sets[name])]
        masks[stage] = np.concatenate([block.mask_BL1 for block in blocks])
        tokens, starts = (np.concatenate([getattr(b, k) for b in blocks]) for k in ("tokens_BL1", "starts_BL1"))
    assert (masks["corpus"] == masks["cache"]).all() and masks["cache"].any() and not masks["cache"].all()
    assert cache["totals"]
    tokenizer = AutoTokenizer.from_pretrained(taught["teacher"]["path"])
    wanted = {tuple(tokenizer.apply_chat_template(messages, return_dict=False)) for messages in conversations()}
    found = []
    for row, begins in zip(tokens, starts, strict=True):
        assert begins[0]
        found += [tuple(part.tolist()) for part in np.split(row, begins.nonzero()[0][1:])]
    padding = {part for part in found if set(part) == {tokenizer.eos_token_id}}
    assert set(found) - padding <= wanted
    assert len(set(found) - padding) > 30


def test_where_the_cache_lies_decides_nothing_and_how_it_is_learnt_from_does(
    taught: dict[str, Any], tmp_path: Path
) -> None:
    def identity(**tune: Any) -> str:
        return states(_run(taught, **tune))[TUNE.name].order.identity

    link = tmp_path / "elsewhere"
    link.symlink_to(taught["tune"]["cache"])
    plain = identity()
    assert identity(cache=str(link)) == plain == identity(divergence="forward_kl")
    chosen: list[dict[str, Any]] = [
        {"alpha": 1.0},
        {"recording": "sampled"},
        {"temperature": 1.0},
        {"divergence": "reverse_kl"},
        {"divergence": "jsd"},
        {"divergence": "jsd", "jsd_beta": 0.1},
        {"tail": "renorm"},
    ]
    assert len({plain, *(identity(**settings) for settings in chosen)}) == 1 + len(chosen)
    assert identity(divergence="jsd") == identity(divergence="jsd", jsd_beta=0.5)


def test_the_runs_own_cache_is_an_input_and_need_not_be_finished_before(taught: dict[str, Any], tmp_path: Path) -> None:
    fresh = states(_run(taught, tmp_path / "fresh", cache="own"))
    assert fresh[TUNE.name].order.inputs.keys() == {"train/distilled/seed-0", "cache"}
    manifest = carry_out(_run(taught, cache="own", num_epochs=1), TUNE, remake=True)
    assert manifest.inputs.keys() == {"train/distilled/seed-0", "cache"}


def test_neither_corpus_nor_teacher_need_be_there(taught: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(taught["tune"]["cache"], tmp_path / "cache")
    manifest = read_manifest(tmp_path / "cache")
    assert manifest is not None
    gone = {name: entry.model_copy(update={"path": "/nowhere"}) for name, entry in manifest.inputs.items()}
    at = StageInput(tmp_path / "cache", manifest.model_copy(update={"inputs": gone}))
    settings = _run(taught).tune
    assert settings is not None
    student = str(Path(taught["out"]) / "train" / "distilled" / "seed-0" / "model")
    lesson = lesson_of(settings, student, at)
    assert (
        lesson.format.tokenizer.chat_template == AutoTokenizer.from_pretrained(taught["teacher"]["path"]).chat_template
    )
    assert lesson.cache is not None
    assert lesson.cache.heldout.shard_set == manifest.shard_sets["heldout-topk"]
    kept = {name: shards for name, shards in manifest.shard_sets.items() if not name.startswith("heldout")}
    with pytest.raises(InputError, match=r"tune\.cache: .*the cache holds no held-out conversations"):
        lesson_of(settings, student, StageInput(at.location, manifest.model_copy(update={"shard_sets": kept})))


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"recording": None}, "tune.recording: the cache has several recordings; found none named, expected one of"),
        ({"temperature": 3.0}, "tune.temperature: the cache's recording topk has no targets at this temperature"),
        ({"recording": "sampled", "divergence": "jsd"}, "the cache does not support this divergence"),
        ({"cache": "nowhere"}, "tune.cache: nowhere: cannot be reused; found no manifest.json"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(taught: dict[str, Any], tune: dict[str, Any], message: str) -> None:
    with pytest.raises(CapgapError, match=message):
        carry_out(_run(taught, **tune), TUNE, remake=True)


def test_a_cache_of_conversations_that_may_be_cut_or_of_another_tokenizer_is_refused(
    taught: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    texts = {"corpus": {"sources": [str(tmp_path / "*.txt")], "tokenizer": taught["corpus"]["tokenizer"]}}
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"say {number} again " * 9)
    settings = {name: taught["corpus"][name] for name in ("seq_len", "teacher_fraction", "heldout_fraction")}
    plain = RunFile.model_validate(
        taught | {"out": str(tmp_path / "out"), "tune": None, "corpus": settings | texts["corpus"]}
    )
    for name in ("corpus", "teacher", "cache"):
        carry_out(plain, Instance(name))
    with pytest.raises(CapgapError, match=r"tune.cache: .*out/cache: the cache is not of whole conversations"):
        carry_out(_run(taught, cache=str(tmp_path / "out" / "cache")), TUNE, remake=True)
    with pytest.raises(CapgapError, match="its tokenizer differs from that of the chat teacher's cache"):
        carry_out(_run(taught, tmp_path / "given", path=str(base)), Instance("tune", seed=0))


def test_a_changed_cache_makes_a_tuning_stale(taught: dict[str, Any], make_run: Callable[..., RunFile]) -> None:
    carry_out(_run(taught), TUNE, remake=True)
    assert states(_run(taught))[TUNE.name].state is State.CURRENT
    changed = states(_run(taught, alpha=0.6))[TUNE.name]
    assert changed.why == "tune.alpha was 0.5, is 0.6"
