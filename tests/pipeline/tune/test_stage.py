from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chats import CHATML, MAX_LEN, conversations, write
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from capgap.pipeline.corpus.records import Conversation, read_record
from capgap.pipeline.corpus.split import split_of
from capgap.pipeline.models.load import load_model
from capgap.pipeline.models.low_bit import LowBitLinear, layers_to_quantise, make_low_bit, scheme_of
from capgap.pipeline.models.trainable import save_trained
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.store import read_blocks
from capgap.pipeline.train.metrics import read_rows
from capgap.pipeline.tune.template import ROLE_MARKS, extend_vocabulary
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import CapgapError, InputError
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_quantize import QuantizeSettings

INT8 = QuantizeSettings(format="int8", head=True)
TUNE = Instance("tune", seed=0)
Made = tuple[Path, Manifest]
MakeRun = Callable[..., RunFile]


@pytest.fixture(scope="module")
def tuned(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Made:
    out = tmp_path_factory.mktemp("tuned")
    return out / "tune" / "seed-0", carry_out(make_run(out), TUNE)


@pytest.fixture(scope="module")
def adapted(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Made:
    out = tmp_path_factory.mktemp("adapted")
    return out / "tune" / "seed-0", carry_out(make_run(out, lora={"r": 4, "alpha": 8, "dropout": 0.1}), TUNE)


def _measured(folder: Path) -> list[float]:
    return [float(row["validation_loss"]) for row in read_rows(folder / "metrics.csv") if row["validation_loss"]]


@pytest.mark.parametrize("kind", ["tuned", "adapted"])
def test_the_held_out_loss_falls_and_stands_in_totals_and_metrics(kind: str, request: pytest.FixtureRequest) -> None:
    folder, manifest = request.getfixturevalue(kind)
    before, *_, last = _measured(folder)
    assert manifest.totals["heldout_loss_before"] == before > 5, "about the logarithm of the vocabulary"
    # merged weights are rounded once more than a sum of products
    assert manifest.totals["heldout_loss_after"] == pytest.approx(last, abs=1e-4)
    assert last < before - (0.1 if kind == "adapted" else 1.5)
    assert "| held-out answers after |" in (folder / "model" / "README.md").read_text()


def test_a_model_of_few_bits_is_tuned_by_the_weights_beside_it(make_run: MakeRun, base: Path, tmp_path: Path) -> None:
    model, few = load_model(str(base), "cpu"), tmp_path / "few"
    make_low_bit(model, layers_to_quantise(model, INT8), scheme_of(INT8))
    save_trained(model, AutoTokenizer.from_pretrained(base), few, True)
    with pytest.raises(CapgapError, match="adapters are not merged into weights of few bits"):
        carry_out(make_run(tmp_path / "adapted", path=str(few / "model"), lora={"r": 4}), TUNE)
    manifest = carry_out(make_run(tmp_path / "out", path=str(few / "model"), max_tokens=4 * 4 * MAX_LEN), TUNE)
    assert manifest.totals["heldout_loss_after"] < manifest.totals["heldout_loss_before"]
    folder = tmp_path / "out" / "tune" / "seed-0"
    served = load_file(folder / "model" / "model.safetensors")
    assert served["lm_head.weight"].dtype == torch.int8
    assert (folder / "high_precision" / "model.safetensors").is_file()
    shutil.rmtree(few / "high_precision")
    with pytest.raises(InputError, match="the model is quantised already"):
        carry_out(make_run(tmp_path / "again", path=str(few / "model")), TUNE)


def test_a_head_of_few_bits_stays_one_when_it_gets_rows() -> None:
    model = tiny_llama(0, tie_word_embeddings=False)
    make_low_bit(model, layers_to_quantise(model, INT8), scheme_of(INT8))
    old_size = model.get_input_embeddings().weight.shape[0]
    extend_vocabulary(model, old_size, old_size + 3)
    head = model.get_output_embeddings()
    assert type(head) is LowBitLinear and head.weight.shape[0] == head.out_features == old_size + 3
    assert model(torch.tensor([[old_size + 2]])).logits.shape[-1] == old_size + 3


def test_the_held_out_loss_is_of_the_answers_alone(tuned: Made) -> None:
    folder, manifest = tuned
    model = load_model(str(folder / "model"), "cpu")
    losses = []
    for block, _ in read_blocks(folder, manifest.shard_sets["heldout"]):
        for tokens, starts, mask in zip(block.tokens_BL1, block.starts_BL1, block.mask_BL1, strict=True):
            bounds = [*starts.nonzero()[0].tolist(), len(tokens)]
            for first, end in pairwise(bounds):
                ids = torch.from_numpy(tokens[first:end]).long()[None]
                logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1].detach(), -1)
                nats = -logprobs.gather(1, ids[0, 1:, None])[:, 0]
                losses.append(nats[torch.from_numpy(mask[first + 1 : end])])
    # sums in another order
    assert float(torch.cat(losses).mean()) == pytest.approx(manifest.totals["heldout_loss_after"], abs=1e-4)


def test_the_tuned_folder_chats_in_transformers_as_it_was_trained(tuned: Made) -> None:
    folder, manifest = tuned
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    (user, answer, again, _) = conversations(8)[7]
    asked = tokenizer.apply_chat_template([user, answer, again], add_generation_prompt=True, return_dict=False)
    seen = {
        tuple(tokens[first : first + len(asked)].tolist())
        for shard_set in manifest.shard_sets.values()
        for block, _ in read_blocks(folder, shard_set)
        for tokens, starts in zip(block.tokens_BL1, block.starts_BL1, strict=True)
        for first in starts.nonzero()[0]
    }
    assert tuple(asked) in seen
    said = model.generate(torch.tensor([asked]), max_new_tokens=20, do_sample=False)[0, len(asked) :].tolist()
    assert said[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id, "it learnt to stop"
    assert tokenizer.decode(said[:-1]) and set(tokenizer.decode(said[:-1])) <= set("it s0123456789!.")


def test_adapters_are_saved_as_peft_reads_them_and_the_model_has_them_merged(adapted: Made, base: Path) -> None:
    import peft

    folder, _ = adapted
    merged = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = AutoModelForCausalLM.from_pretrained(base)
    before.resize_token_embeddings(merged.config.vocab_size)
    loaded = peft.PeftModel.from_pretrained(before, str(folder / "adapter")).eval()
    ids = torch.arange(20)[None]
    # sums in another order
    torch.testing.assert_close(loaded(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    assert not any("lora" in name for name in merged.state_dict())


def test_what_is_not_adapted_stays_as_it_was(adapted: Made, base: Path) -> None:
    folder, _ = adapted
    old, new = load_file(base / "model.safetensors"), load_file(folder / "model" / "model.safetensors")
    same = {name for name in old if old[name].shape == new[name].shape and torch.equal(old[name], new[name])}
    assert {name for name in old if "norm" in name} <= same
    assert not any("proj" in name for name in same)
    size = len(AutoTokenizer.from_pretrained(base))
    assert len(new["model.embed_tokens.weight"]) == size + len(ROLE_MARKS) > len(old["model.embed_tokens.weight"])
    assert torch.equal(new["model.embed_tokens.weight"][:size], old["model.embed_tokens.weight"][:size])


def _weights(folder: Path) -> dict[str, str]:
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    return {file.path: file.sha256 for file in manifest.files if file.path.endswith(".safetensors")}


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("kind", ["tuned", "adapted"])
def test_a_killed_tuning_ends_in_the_same_bits(
    kind: str, request: pytest.FixtureRequest, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = request.getfixturevalue(kind)
    lora = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}} if kind == "adapted" else {}
    run, folder = make_run(tmp_path, **lora), tmp_path / "tune" / "seed-0"
    from capgap.pipeline.train.module import DistillationModule

    calls, training_step = [0], DistillationModule.training_step

    def stop(self: Any, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 11:
            raise _KilledError
        return training_step(self, *arguments)

    monkeypatch.setattr(DistillationModule, "training_step", stop)
    with pytest.raises(_KilledError):
        carry_out(run, TUNE)
    checkpoints = sorted((folder / "work" / "checkpoints").glob("step-*.ckpt"))
    assert checkpoints[-1].name == "step-00000008.ckpt"
    if kind == "adapted":
        kept = torch.load(checkpoints[-1], weights_only=True)["checkpoint"]["state_dict"]
        assert kept and all("lora" in name for name in kept), "frozen weights are not in a checkpoint"
    monkeypatch.undo()
    carry_out(run, TUNE)
    assert _weights(folder) == _weights(whole)
    assert _measured(folder) == _measured(whole)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            "tune.sources: .*chat.jsonl:2, message 1: unknown role; fo",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            "tune.sources: .*chat.jsonl:2: the conversation has no turn",
        ),
        ({"text": "x"}, r"tune.sources: .*chat.jsonl:2: no conversation; found fields text.*set tune.messages_field$"),
        ("x", "tune.sources: .*chat.jsonl:2: no conversation; found 'x', expected a list"),
    ],
)
def test_bad_conversations_are_named_and_what_was_made_is_kept(
    tuned: Made, make_run: MakeRun, tmp_path: Path, record: Any, message: str
) -> None:
    made, _ = tuned
    shutil.copytree(made, tmp_path / "tune" / "seed-0")
    bad = write(tmp_path / "chat.jsonl", [{"messages": conversations(1)[0]}, record])
    with pytest.raises(InputError, match=message):
        carry_out(make_run(tmp_path, sources=[bad]), TUNE)
    assert _weights(tmp_path / "tune" / "seed-0") == _weights(made)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"chat_template": "nowhere.jinja"},
            "tune.chat_template: nowhere.jinja: no chat template can be read; found No",
        ),
        (
            {"chat_template": "own"},
            "the tokenizer's own chat template: there is no single chat template; found no chat temp",
        ),
        (
            {"max_len": 65},
            "tune.max_len, for .*: the rows are longer than the model takes; found 65, expected at most 64",
        ),
        ({"max_len": 8}, "no conversation is left to learn from; found .* without an answer that ends within 8 tokens"),
        (
            {"heldout_fraction": 1e-9},
            "no conversation is held out; found none, expected at least one; change tune.held",
        ),
        (
            {"lora": {"target_modules": ["nothing"]}},
            "tune.lora.target_modules: nothing: these layers cannot be adapted",
        ),
        ({"lora": {"target_modules": ["lm_head"]}}, "tune.lora.target_modules: lm_head: .*the head among them"),
        ({"sources": ["README.md"]}, "tune.sources: README.md: "),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    make_run: MakeRun, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CapgapError, match=message):
        carry_out(make_run(tmp_path, **settings), TUNE)


def test_a_model_that_lacks_weights_is_refused_before_anything_is_made(
    make_run: MakeRun, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "given")
    file = tmp_path / "given" / "model.safetensors"
    weights = load_file(file)
    lost = weights.popitem()[0]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(InputError, match=rf"tune\.path: .*given: the weights are not .* found 1 missing: {lost}"):
        carry_out(make_run(tmp_path, path=str(tmp_path / "given")), TUNE)
    assert not list((tmp_path / "tune").rglob("model"))


def test_a_given_template_one_conversation_a_row_and_the_best_weights(
    make_run: MakeRun, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "given.jinja").write_text(CHATML.replace("<|im_end|>", "{{ eos_token }}"))
    turns = [{"conversation": [messages[0]["content"], messages[1]["content"]]} for messages in conversations(20)] + [
        {"conversation": [{"User": m[0]["content"], "Assistant": m[1]["content"]}]} for m in conversations(40)[20:]
    ]
    run = make_run(
        tmp_path,
        chat_template=str(tmp_path / "given.jinja"),
        sources=[write(tmp_path / "turns.jsonl", turns)],
        messages_field="conversation",
        packing=False,
        max_len=64,
        output="best",
        num_epochs=1,
    )
    manifest = carry_out(run, TUNE)
    totals = manifest.totals
    assert totals["num_train_conversations"] + totals["num_heldout_conversations"] == 40
    assert totals["num_train_rows"] == totals["num_train_conversations"] == totals["num_train_answers"]
    assert totals["heldout_loss_after"] == pytest.approx(totals["best_validation_loss"], abs=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tune" / "seed-0" / "model")
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(base)), "no marks were added"
    (tmp_path / "given.jinja").write_text("{{ messages[0].content }}")
    assert states(run)["tune/seed-0"].state is State.STALE


def test_answers_that_do_not_end_within_a_row_are_left_out_and_counted(make_run: MakeRun, tmp_path: Path) -> None:
    long = [{"role": "assistant", "content": "it is " * MAX_LEN}]
    kept = [{"messages": [*messages, *messages[:1], *long]} for messages in conversations(20)]
    lost = [{"messages": [{"role": "user", "content": f"say {i}"}, *long]} for i in range(5)]
    run = make_run(tmp_path, sources=[write(tmp_path / "long.jsonl", kept + lost)], num_epochs=1)
    totals = carry_out(run, TUNE).totals
    parts = ("train", "heldout")
    assert sum(totals[f"num_{part}_conversations"] for part in parts) == 20
    assert sum(totals.get(f"num_{part}_dropped_conversations", 0) for part in parts) == 5
    assert sum(totals.get(f"num_{part}_dropped_answers", 0) for part in parts) == 25
    assert sum(totals[f"num_{part}_answers"] for part in parts) == 40


@pytest.mark.parametrize(
    ("left_out", "message"),
    [("student", "no answer is left to learn from"), ("heldout", "no answer that counts is held out")],
)
def test_conversations_of_which_no_answer_counts_are_refused(
    make_run: MakeRun, tmp_path: Path, left_out: str, message: str
) -> None:
    def split(messages: list[dict[str, Any]]) -> str:
        record = read_record("a", {"messages": messages}, "text", "auto")
        assert isinstance(record, Conversation)
        return split_of(record.said, 0.0, 0.2)

    said = conversations()
    muted = [[one | ({"weight": 0} if one["role"] == "assistant" else {}) for one in messages] for messages in said]
    records = [one for one in said if split(one) != left_out] + [one for one in muted if split(one) == left_out]
    run = make_run(tmp_path / "out", sources=[write(tmp_path / "chat.jsonl", [{"messages": one} for one in records])])
    with pytest.raises(
        InputError, match=f"{message}; found only answers of weight 0, expected at least one answer with another weight"
    ):
        carry_out(run, TUNE)


def test_a_conversation_that_was_exported_twice_is_learnt_or_measured_once(make_run: MakeRun, tmp_path: Path) -> None:
    talks = [
        {"messages": [{"id": f"{export}-{i}", **message} for i, message in enumerate(messages)]}
        for export in range(2)
        for messages in conversations(20)
    ]
    source = write(tmp_path / "twice.jsonl", talks)
    totals = carry_out(make_run(tmp_path, sources=[source], num_epochs=1), TUNE).totals
    assert totals["num_repeated_conversations"] == 20
    assert totals["num_train_conversations"] + totals["num_heldout_conversations"] == 20


def test_bad_conversations_are_skipped_and_counted(make_run: MakeRun, tmp_path: Path) -> None:
    good = [{"conversations": [{"from": m["role"], "value": m["content"]} for m in talk]} for talk in conversations(20)]
    bad = [{"prompt": "x", "completion": ""}, {"text": "x"}, "x"]
    source = write(tmp_path / "mixed.jsonl", good + bad)
    settings: dict[str, Any] = {"sources": [source], "num_epochs": 1, "on_bad_record": "skip"}
    totals = carry_out(make_run(tmp_path, **settings, max_bad_fraction=0.2), TUNE).totals
    assert totals["num_bad_records"] == 3
    assert totals["num_train_conversations"] + totals["num_heldout_conversations"] == 20
    with pytest.raises(InputError, match=r"tune.sources: too many records cannot be used; found 2 of 23 .* 0.01, tu"):
        carry_out(make_run(tmp_path, **settings), TUNE, remake=True)


def test_a_finished_tuning_is_current_and_another_setting_makes_it_stale(tuned: Made, make_run: MakeRun) -> None:
    folder, _ = tuned
    out = folder.parents[1]
    assert states(make_run(out))["tune/seed-0"].state is State.CURRENT
    stale = states(make_run(out, learning_rate=2e-2))["tune/seed-0"]
    assert (stale.state, stale.why) == (State.STALE, "tune.learning_rate was 0.01, is 0.02")
    assert json.loads((folder / "manifest.json").read_bytes())["stage"] == "tune"
