"""What a model writes: its very tokens, in a corpus of the usual form, once each, and the same again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from round_runs import (
    FIRST,
    SEQ_LEN,
    TEMPLATE,
    answers_of,
    logprobs_again,
    prompt_lines,
    shards_of,
    write_prompts,
)
from tiny_chats import save_chat_model

from capgap.pipeline.generate.asking import Asking, require_same_ends, turn_ends
from capgap.pipeline.generate.prompts import PromptRecord, read_prompts
from capgap.pipeline.models.load import load_model
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.stage.context import Instance, Slice
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.slices import carry_out_slice
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.facts import CorpusFacts
from capgap.schemas.run_file import RunFile

MakeRounds = Callable[..., RunFile]


def test_the_text_is_a_corpus_of_whole_answers_whose_labels_begin_where_they_do(make_rounds: MakeRounds) -> None:
    run = make_rounds(num_samples=2)
    manifest = carry_out(run, FIRST)
    folder = Path(run.out) / FIRST.name
    facts = CorpusFacts.model_validate(manifest.facts)
    assert facts.context == "document" and facts.whole_conversations
    assert manifest.totals["answers"] == facts.splits["student"].num_documents
    lines = prompt_lines(24)
    tokenizer = load_tokenizer(folder / "tokenizer")
    for split, num_samples in (("student", 2), ("heldout", 1)):
        rows, answers = shards_of(folder, manifest, split), answers_of(folder, split)
        labels = sum(int(one.mask_BL1.sum()) for one in rows)
        kept = [(number, one) for number, one in answers if one.row >= 0]
        assert (
            labels
            == sum(len(one.logprobs) for _, one in kept)
            == facts.splits[split].by_source[facts.text_sources[0]].num_labels
        )
        assert max(one.sample for _, one in answers) == num_samples - 1
        num_bytes = num_tokens = 0
        for number, one in kept:
            part = slice(one.first, one.first + len(one.logprobs))
            tokens, mask = rows[number].tokens_BL1[one.row], rows[number].mask_BL1[one.row]
            assert mask[part].all() and not mask[one.first - 1]
            # behind what it says stands what ended it
            assert str(tokenizer.decode(tokens[part], skip_special_tokens=True)).startswith(one.text)
            start = int(np.flatnonzero(rows[number].starts_BL1[one.row][: one.first]).max())
            asked = str(tokenizer.decode(tokens[start : one.first], skip_special_tokens=True))
            num_bytes += len(str(tokenizer.decode(tokens[start : part.stop])).encode())
            num_tokens += part.stop - start
            line = lines[one.prompt]
            assert asked.strip().endswith(str(line.get("prompt", "assistant:")).strip())
            assert one.finish == "stop" or len(one.logprobs) == 10
        # the bytes of the text whose tokens are counted, prompts with answers: bits per byte are made of both
        assert (facts.splits[split].num_text_bytes, facts.splits[split].num_text_tokens) == (num_bytes, num_tokens)


def test_the_logprobs_are_those_that_transformers_gives_to_the_same_tokens(make_rounds: MakeRounds, begun) -> None:
    run = make_rounds()
    manifest = carry_out(run, FIRST)
    folder = Path(run.out) / FIRST.name
    differences = logprobs_again(folder, manifest, load_model(begun["teacher"]["path"], "cpu"))
    # float32 sums in another order: with the keys and values of earlier tokens kept, and all at once
    assert differences.square().mean().sqrt() < 1e-5


def test_a_text_comes_out_again_and_at_another_seed_it_does_not(make_rounds: MakeRounds) -> None:
    run, other = make_rounds(), make_rounds(seed=1)
    content = carry_out(run, FIRST).content
    assert carry_out(run, FIRST, remake=True).content == content
    assert states(other)[FIRST.name].why == "rounds.seed was 0, is 1"
    assert carry_out(other, FIRST, remake=True).content != content


def test_a_killed_stage_and_slices_make_each_unit_once_and_end_alike(make_rounds: MakeRounds, tmp_path: Path) -> None:
    run, folder = make_rounds(), tmp_path / "out" / FIRST.name
    # a slice stands for a process that was killed after some units
    assert carry_out_slice(run, FIRST, Slice(0, 2)) is None
    assert states(run)[FIRST.name].state is State.PARTIAL
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    sorted(folder.glob("*.answers.parquet"))[0].write_bytes(b"")
    content = carry_out(run, FIRST).content
    untouched = [name for name, made in kept.items() if (folder / name).stat().st_mtime_ns == made]
    assert len(untouched) == len(kept) - 1
    shutil.rmtree(folder)
    assert carry_out_slice(run, FIRST, Slice(1, 2)) is None
    sliced = carry_out_slice(run, FIRST, Slice(None))
    assert sliced is not None and sliced.content == content


def test_an_answer_is_graded_against_its_reference(make_rounds: MakeRounds) -> None:
    run = make_rounds(answer_pattern="(.)")
    manifest = carry_out(run, FIRST)
    folder = Path(run.out) / FIRST.name
    graded = [one for _, one in answers_of(folder, "heldout") if one.right is not None]
    assert manifest.totals["heldout_graded"] == len(graded) > 0
    assert manifest.totals["heldout_right"] == 0  # no single character is `salt`


def test_prompts_that_leave_no_room_are_counted_and_no_more(make_rounds: MakeRounds, tmp_path: Path) -> None:
    long = [{"prompt": f"{i} {'salt ' * SEQ_LEN}"} for i in range(9)]
    prompts = write_prompts(tmp_path / "p.jsonl", [*prompt_lines(24), *long[:6]])
    manifest = carry_out(make_rounds(prompts=prompts), FIRST)
    assert manifest.totals["too_long"] + manifest.totals["heldout_too_long"] == 6
    everything = write_prompts(tmp_path / "p.jsonl", long)
    with pytest.raises(InputError, match="no answer is left"):
        carry_out(make_rounds(prompts=everything), FIRST, remake=True)


def test_a_teacher_that_never_stops_is_refused(make_rounds: MakeRounds) -> None:
    # one token: no answer can both say something and end
    with pytest.raises(InputError, match="the teacher ended none of its answers"):
        carry_out(make_rounds(stop=(), max_new_tokens=1), FIRST)


def test_a_student_that_never_stops_is_cut_off_and_counted(make_rounds: MakeRounds) -> None:
    run = make_rounds(first_writer="student", stop=(), max_new_tokens=2)
    first = Instance("generate", seed=1, round=0)
    totals = carry_out(run, first).totals
    assert totals["cut_off"] >= totals["answers"] - 1


def test_a_text_of_nothing_but_empty_answers_is_refused(make_rounds: MakeRounds, begun, tmp_path: Path) -> None:
    folder = with_files(begun, tmp_path, {"generation_config.json": json.dumps({"eos_token_id": list(range(300))})})
    run = make_rounds({"teacher": {"path": folder}})
    carry_out(run, Instance("teacher"), remake=True)
    with pytest.raises(InputError, match="no answer is left") as caught:
        carry_out(run, FIRST)
    assert "0 leave no room for an answer" in str(caught.value)


def test_a_special_token_in_a_prompts_text_is_text(make_rounds: MakeRounds, begun) -> None:
    folder = begun["teacher"]["path"]
    tokenizer, rounds = load_tokenizer(folder), make_rounds().rounds
    assert rounds is not None
    asking = Asking(tokenizer, folder, rounds, (), chats=True)
    says = f"stop {tokenizer.eos_token} here"
    text = asking.ids(PromptRecord("a:1", (), says))
    assert tokenizer.eos_token_id not in text and tokenizer.decode(text) == says
    # the template itself ends the message with one
    chat = asking.ids(PromptRecord("a:2", ({"role": "user", "content": says},), ""))
    assert chat.count(tokenizer.eos_token_id) == 1


def test_a_template_that_refuses_a_prompt_is_named(make_rounds: MakeRounds, begun, tmp_path: Path) -> None:
    needs_system = "{% if messages[0].role != 'system' %}{{ raise_exception('begin with system') }}{% endif %}"
    folder = with_files(begun, tmp_path, {"chat_template.jinja": needs_system})
    run = make_rounds({"teacher": {"path": folder}})
    carry_out(run, Instance("teacher"), remake=True)
    with pytest.raises(InputError, match="the writer's chat template refuses a prompt") as caught:
        carry_out(run, FIRST)
    assert "begin with system" in str(caught.value)


def test_a_later_prompt_that_the_template_refuses_is_named_before_anything_is_written(
    make_rounds: MakeRounds, begun, tmp_path: Path
) -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + TEMPLATE
    folder = with_files(begun, tmp_path, {"chat_template.jinja": no_system})
    told = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "salt?"}]}
    prompts = write_prompts(tmp_path / "p.jsonl", [*prompt_lines(24), told])
    run = make_rounds({"teacher": {"path": folder}}, prompts=prompts)
    carry_out(run, Instance("teacher"), remake=True)
    with pytest.raises(InputError, match=r"the writer's chat template refuses a prompt; found .*no system message"):
        carry_out(run, FIRST)
    assert states(run)[FIRST.name].why == "never made"


def test_prompts_that_changed_since_answers_were_written_are_named(make_rounds: MakeRounds, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", prompt_lines(24))
    run = make_rounds(prompts=prompts)
    assert carry_out_slice(run, FIRST, Slice(0, 2)) is None
    write_prompts(tmp_path / "p.jsonl", prompt_lines(8))
    with pytest.raises(MismatchError, match=r"from other sources; found source .*p.jsonl changed since this stage"):
        carry_out(run, FIRST)


CALLING = "{% if tools %}tools {{ tools | tojson }} {% endif %}" + TEMPLATE.replace(
    "{{ eos_token }}", "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ eos_token }}"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALLED = {
    "messages": [
        {"role": "user", "content": "3 + 4?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}],
        },
        {"role": "tool", "content": "7"},
    ],
    "tools": [ADD],
}


def test_tools_and_their_calls_reach_the_writer_as_in_a_corpus(make_rounds: MakeRounds, begun, tmp_path: Path) -> None:
    (prompt,) = read_prompts([write_prompts(tmp_path / "calls.jsonl", [CALLED])])
    folder, rounds = with_files(begun, tmp_path, {"chat_template.jinja": CALLING}), make_rounds().rounds
    assert rounds is not None
    tokenizer = load_tokenizer(folder)
    said = tokenizer.decode(Asking(tokenizer, folder, rounds, (), chats=True).ids(prompt))
    assert said.startswith(f"tools {json.dumps([ADD])} user: 3 + 4?")
    assert json.dumps([{"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}]) in said
    assert said.endswith(f"tool: 7{tokenizer.eos_token}assistant: ")


def test_a_template_that_leaves_out_a_call_or_a_system_message_is_refused(
    make_rounds: MakeRounds, begun, tmp_path: Path
) -> None:
    silent = TEMPLATE.replace("{{ message.role }}", "{% if message.role == 'system' %}{% continue %}{% endif %}")
    folder, rounds = with_files(begun, tmp_path, {"chat_template.jinja": silent}), make_rounds().rounds
    assert rounds is not None
    asking = Asking(load_tokenizer(folder), folder, rounds, (), chats=True)
    told = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "3 + 4?"}]}
    for line, found in (
        (CALLED, "a tool call is not written: add"),
        (told, "leaves out the message of the role system"),
    ):
        (prompt,) = read_prompts([write_prompts(tmp_path / "calls.jsonl", [line])])
        with pytest.raises(InputError, match=f"the writer's chat template refuses a prompt; found .*{found}"):
            asking.ids(prompt)


def test_a_template_with_special_tokens_that_the_corpus_does_not_know_is_named(
    make_rounds: MakeRounds, begun, tmp_path: Path
) -> None:
    chat = save_chat_model(tmp_path / "chat", begun["teacher"]["path"], max_position_embeddings=SEQ_LEN)
    run = make_rounds({"teacher": {"path": chat}})
    carry_out(run, Instance("teacher"), remake=True)
    message = (
        r"special tokens that the corpus's tokenizer does not have; found '<\|im_start\|>', '<\|im_end\|>', expected"
    )
    with pytest.raises(MismatchError, match=message):
        carry_out(run, FIRST)


def with_files(begun: dict[str, Any], tmp_path: Path, files: dict[str, str]) -> str:
    """The given teacher with other files beside its weights."""
    folder = tmp_path / "other"
    shutil.copytree(begun["teacher"]["path"], folder)
    for name, text in files.items():
        (folder / name).write_text(text)
    return str(folder)


def test_a_student_that_ends_its_turns_in_another_way_is_refused(begun) -> None:
    folder = begun["teacher"]["path"]
    tokenizer = load_tokenizer(folder)
    ends = turn_ends(tokenizer, folder)
    assert ends == (tokenizer.eos_token_id,)
    require_same_ends(ends, ends, "student")
    require_same_ends((), ends, "student")  # what a template does not tell is not held against it
    with pytest.raises(MismatchError, match="the student ends an answer in another way"):
        require_same_ends((7,), ends, "student")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "is no prompt"),
        (json.dumps({"text": "a"}), "neither messages nor prompt"),
        (json.dumps({"prompt": ""}), "no text, or empty"),
        (json.dumps({"prompt": "a", "messages": []}), "both of messages and prompt"),
        (json.dumps({"messages": [{"role": "user"}]}), "a message of the user has no text"),
        (json.dumps({"messages": [{"role": "assistant", "content": "a"}]}), "ends with the assistant"),
        (json.dumps({"messages": [{"role": "judge", "content": "a"}]}), "unknown role: 'judge'"),
        (json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": "add"}), "the tools cannot be read"),
        (json.dumps({"prompt": "a \ud800"}), "half of a surrogate pair"),
        (json.dumps({"prompt": "a", "reference": 3}), "neither a text nor a list of texts"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(make_rounds: MakeRounds, tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + line + "\n")
    with pytest.raises(InputError, match=found) as caught:
        carry_out(make_rounds(prompts=str(path)), FIRST)
    assert f"{path}:2" in str(caught.value)


def test_a_missing_file_and_an_empty_one_are_named(make_rounds: MakeRounds, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        carry_out(make_rounds(prompts=str(tmp_path / "none.jsonl")), FIRST)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="there is no prompt"):
        carry_out(make_rounds(prompts=str(tmp_path / "empty.jsonl")), FIRST)
    one = write_prompts(tmp_path / "one.jsonl", [{"prompt": "a"}])
    with pytest.raises(InputError, match=r"no prompt is (held out|left to learn from)"):
        carry_out(make_rounds(prompts=one), FIRST)
